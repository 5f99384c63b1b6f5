"""GLA's decay gate in a model: by kernels where its layers are what they were built as, else by calling them.

The kernels run in Triton's interpreter on a CPU, or as they are on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from statex.kernels import pointwise
from statex.models.gla import GLAMixer
from tests.kernels.inputs import distance
from tests.models.build import build, describe, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ["gla", "gla-grouped", "gla-expanded"]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The gate's kernels, on a CPU too; the list counts their calls."""
    pytest.importorskip("triton")
    from statex.kernels.fused import decay_gate

    called: list[int] = []
    kernel, others = decay_gate.low_rank_log_decay, pointwise._kernels
    monkeypatch.setattr(decay_gate, "low_rank_log_decay", lambda *args, **options: called.append(1) or kernel(*args, **options))
    monkeypatch.setattr(decay_gate, "FEW", 8)
    monkeypatch.setattr(
        pointwise,
        "_kernels",
        lambda *args, module="pointwise": decay_gate if module == "decay_gate" else others(*args, module=module),
    )
    return called


def found(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": outputs.logits.detach()} | gradients


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_the_kernels_equals_one_without(name: str, fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(name).to(DEVICE), tokens(2, 9).to(DEVICE)
    ours = found(model, ids)
    assert len(fused) == len(model.model.layers)
    monkeypatch.setattr("statex.models.gla.plain_layers", lambda _: [])
    for key, x in found(model, ids).items():
        assert distance(ours[key], x) < (1e-5 if DEVICE == "cuda" else 5e-5), key  # the interpreter cuts bfloat16 off
    assert len(fused) == len(model.model.layers)


@torch.no_grad()
def test_under_autocast_the_kernels_take_bfloat16_rows_and_keep_log_decays_exact(fused: list[int]) -> None:
    mixer = build("gla").model.layers[0].mixer.to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = mixer._log_decay(x)
    assert (ours.dtype, len(fused)) == (torch.float32, 1)
    assert distance(ours, mixer.double()._log_decay(x.double())) < 1e-6


@pytest.mark.parametrize("form", ["fused", "PyTorch"])
@torch.no_grad()
def test_a_model_of_which_all_is_bfloat16_runs(form: str, request: pytest.FixtureRequest) -> None:
    called = request.getfixturevalue("fused") if form == "fused" else []
    model, ids = build("gla").to(DEVICE), tokens(2, 9).to(DEVICE)
    exact = model(ids).logits
    assert distance(model.to(torch.bfloat16)(ids).logits, exact) < 0.05
    assert bool(called) == (form == "fused" or DEVICE == "cuda")


class Adapted(nn.Linear):
    """A layer with a path of its own beside the weight, as adapters and quantised layers have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Packed(nn.Parameter):
    """A weight whose product is not that of its numbers, as quantised and distributed ones are."""


def adapt(gate: nn.Sequential, place: int) -> None:
    gate[place].__class__ = Adapted


def call_past(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: original(x) + 1  # type: ignore[method-assign]


def set_weight(layer: nn.Linear, weight: nn.Parameter) -> None:
    layer.weight = weight


class Wrapped(nn.Module):
    """As adapters that keep the original beside their copy."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + 1


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "adapter on the first layer": lambda gate: adapt(gate, 0),
    "adapter on the second layer": lambda gate: adapt(gate, 1),
    "hook on the first layer": lambda gate: gate[0].register_forward_hook(lambda _, __, out: out + 1),
    "hook on the second layer": lambda gate: gate[1].register_forward_hook(lambda _, __, out: out + 1),
    "hook on both": lambda gate: gate.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    "wrapper around both": Wrapped,
    "offloaded layer": lambda gate: call_past(gate[0]),
    "offloaded pair": call_past,
    "weight of a kind of its own": lambda gate: set_weight(gate[1], Packed(gate[1].weight.detach())),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_gate_with_something_of_its_own_is_called(change: str, fused: list[int]) -> None:
    mixer = GLAMixer(model := describe("gla"), model.layers[0]).to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    changed = CHANGES[change](mixer.gk_proj)
    if isinstance(changed, nn.Module):
        mixer.gk_proj = changed
    expected = torch.nn.functional.logsigmoid(mixer.gk_proj(x)) / mixer.gate_logit_normalizer
    torch.testing.assert_close(mixer._log_decay(x), expected)
    assert not fused


def test_adapters_of_peft_on_the_gate_get_gradients(fused: list[int]) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["gk_proj.0", "gk_proj.1"], init_lora_weights=False)
    adapted, ids = peft.get_peft_model(build("gla").to(DEVICE), options), tokens(2, 9).to(DEVICE)
    adapted(input_ids=ids, labels=ids).loss.backward()
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert adapters
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters)
    assert not fused
