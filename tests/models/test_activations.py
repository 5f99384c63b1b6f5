"""Layers whose activations are kept: as many as fit, the last first, and never another gradient."""

import pytest
import torch

from statex.models import StatexForCausalLM
from statex.models.activations import CudaMemory, FittedCheckpointing
from tests.models.build import build, describe, tokens


class Ledger:
    """A memory in which every layer that runs takes `size`, and every layer that is kept as much of the peak, or `weight` of it."""

    def __init__(self, capacity: int, *, base: int = 100, size: int = 10, weight: int = 10) -> None:
        self.given, self.base, self.size, self.weight = capacity, base, size, weight
        self.held = 0
        self.fitted: FittedCheckpointing | None = None

    def allocated(self) -> int:
        self.held += self.size
        return self.held

    def peak(self) -> int:
        assert self.fitted is not None
        return self.base + self.weight * self.fitted.kept

    def capacity(self) -> int:
        return self.given

    def restart(self) -> None:
        pass


def fit(layers: int, memory: Ledger) -> tuple[StatexForCausalLM, FittedCheckpointing]:
    model = build(describe("gla", num_hidden_layers=layers)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    memory.fitted = FittedCheckpointing(model, memory)
    return model, memory.fitted


def train(model: StatexForCausalLM, fitted: FittedCheckpointing, steps: int) -> list[list[bool]]:
    """Which layers were checkpointed in each step."""
    ids, seen = tokens(1, 5), []
    for _ in range(steps):
        seen.append([layer.gradient_checkpointing for layer in model.model.layers])
        with fitted.step():
            model(ids, labels=ids).loss.backward()
    return seen


def test_after_two_steps_the_last_layers_are_kept_as_far_as_they_fit() -> None:
    model, fitted = fit(4, Ledger(125))
    every, last_two = [True] * 4, [True, True, False, False]
    assert train(model, fitted, 5) == [every, every, last_two, last_two, last_two]
    assert fitted.settled
    assert fitted.kept == 2


@pytest.mark.parametrize(("capacity", "kept"), [(109, 0), (110, 1), (140, 4), (1000, 4)])
def test_what_is_kept_never_exceeds_the_capacity(capacity: int, kept: int) -> None:
    model, fitted = fit(4, Ledger(capacity))
    train(model, fitted, 4)
    assert fitted.settled
    assert fitted.kept == kept


def test_room_that_a_measured_peak_leaves_is_used() -> None:
    model, fitted = fit(4, Ledger(120, weight=5))  # two at first, whose peak of 110 leaves room for one more
    kept = [4 - sum(step) for step in train(model, fitted, 6)]
    assert kept == [0, 0, 2, 3, 3, 3]
    assert fitted.settled


def test_a_retreat_checkpoints_all_layers_for_good() -> None:
    model, fitted = fit(3, Ledger(1000))
    train(model, fitted, 3)
    assert fitted.kept == 3
    assert fitted.retreat()
    assert fitted.kept == 0
    assert not fitted.retreat()
    assert train(model, fitted, 2) == [[True] * 3] * 2


def test_a_retreat_within_a_step_is_not_undone_by_it() -> None:
    model, fitted = fit(3, Ledger(110, weight=0))
    train(model, fitted, 2)
    assert fitted.kept == 1
    assert not fitted.settled
    with fitted.step():
        fitted.retreat()
    assert fitted.kept == 0


def test_what_is_kept_changes_no_gradient() -> None:
    model, fitted = fit(3, Ledger(120))
    ids = tokens(2, 9)
    gradients = []
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        with fitted.step():
            model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert fitted.kept == 2
    assert all(torch.equal(a, b) for later in gradients[1:] for a, b in zip(gradients[0], later, strict=True))


def test_without_checkpointing_there_is_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match="enable gradient checkpointing first"):
        FittedCheckpointing(build("gla"), Ledger(100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["gla", "mamba2", "delta_net", "mamba", "hgrn"])
def test_on_a_gpu_the_peak_stays_below_what_was_given(name: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ids = tokens(2, 4096).to(device)
    model = build(describe(name, num_hidden_layers=8)).to(device).train()

    class Given(CudaMemory):
        given = 0

        def capacity(self) -> int:
            return self.given

    def trained(given: int) -> tuple[int, int]:
        """Layers kept, and the peak of a step with them."""
        model.gradient_checkpointing_enable({"use_reentrant": False})
        memory = Given(device)
        memory.given = given
        fitted = FittedCheckpointing(model, memory)
        while not fitted.settled:
            with fitted.step():
                step()
        memory.restart()
        step()
        return fitted.kept, memory.peak()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()
        model.zero_grad(set_to_none=False)

    none, least = trained(0)
    every, most = trained(2**62)
    assert (none, every) == (0, 8)
    assert least < most
    some, peak = trained((least + most) // 2)
    assert 0 < some < 8
    assert peak <= (least + most) // 2
