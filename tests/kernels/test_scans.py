"""The elementwise recurrences, HGRN's and Mamba's selective scan, against the float64 loop: values, gradients, packing, a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statex.kernels import chunking, elementwise, hgrn, selective_scan, selective_scan_step
from tests.kernels.inputs import DECAYS, distance, gradients, in_float64, log_decays

TOLERANCE = 1e-5
LENGTHS = {1: DECAYS, 32: ("mixed",), 33: DECAYS, 257: ("mixed", "none"), 1100: ("mixed",)}
"""Around a run that goes step by step; the last is long enough for three levels. With the gates to try at each."""


def hgrn_inputs(tokens: int, decay: str = "mild", *, batch: int = 2, states: int | None = None) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, tokens, 5),
        "log_decay": log_decays(decay, batch, tokens, 5),
        "initial_state": torch.randn(states or batch, 5),
    }


def scan_inputs(
    tokens: int, decay: str = "mild", *, batch: int = 2, states: int | None = None, lift: int = 1, signed: bool = False
) -> dict[str, Any]:
    inputs = {
        "x": torch.randn(batch, tokens, 6),
        "dt": -log_decays(decay, batch, tokens, 6),
        "A": -0.5 - 0.5 * torch.rand(6, 4),
        "B": torch.randn(batch, tokens, 4),
        "C": torch.randn(batch, tokens, 4),
        "D": torch.randn(6),
        "initial_state": torch.randn(states or batch, 1, lift * 4, 6),
    }
    if lift > 1:
        inputs["lift_gamma"] = torch.randn(1, (lift - 1) * 4)
    if signed:
        inputs["spectrum"] = 2 * torch.rand(6) - 1
    return inputs


KERNELS = {
    "hgrn": (hgrn, hgrn_inputs, {}),
    "selective scan": (selective_scan, scan_inputs, {}),
    "selective scan, lifted": (selective_scan, scan_inputs, {"lift": 2}),
    "selective scan, below 0": (selective_scan, scan_inputs, {"signed": True, "lift": 2}),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(params=["levels", "step by step", "many segments"])
def every_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels, as small states go; every step by itself, as large ones do; segments of few tokens, made again going back."""
    worth = 0 if request.param == "step by step" else 1 << 30
    monkeypatch.setitem(elementwise.WORTH_A_STEP, "cpu", worth)
    if request.param == "many segments":
        monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", 1 << 13)


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("tokens", LENGTHS)
@every_kernel
def test_outputs_and_states_equal_the_references_at_any_length_and_gate(name: str, tokens: int) -> None:
    kernel, make, options = KERNELS[name]
    for decay in LENGTHS[tokens]:
        inputs = make(tokens, decay, **options)
        got = kernel(**inputs, output_final_state=True)
        expected = kernel(**in_float64(inputs), output_final_state=True, backend="reference")
        assert max(map(distance, got, expected)) < TOLERANCE, decay


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("decay", ["mild", "mixed", "violent"])
@every_kernel
def test_every_gradient_equals_the_references(name: str, decay: str) -> None:
    kernel, make, options = KERNELS[name]
    inputs = make(150, decay, **options)
    expected = gradients(kernel, in_float64(inputs), backend="reference")
    for part, gradient in gradients(kernel, inputs).items():
        assert distance(gradient, expected[part]) < TOLERANCE, part


@pytest.mark.usefixtures("every_path")
@every_kernel
def test_gradients_of_gradients_equal_the_references(name: str) -> None:
    kernel, make, options = KERNELS[name]
    inputs = {key: x.requires_grad_() for key, x in in_float64(make(40, batch=1, **options)).items()}

    def second(backend: str) -> list[Tensor]:
        out, _ = kernel(**inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), list(inputs.values()), create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), list(inputs.values())))

    for ours, theirs in zip(second("chunked"), second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


BORDERS = torch.tensor([0, 5, 5, 38, 110])


@pytest.mark.parametrize("states", [False, True], ids=["from zero", "from states of their own"])
@every_kernel
def test_packed_sequences_equal_each_by_itself(name: str, states: bool) -> None:
    kernel, make, options = KERNELS[name]
    inputs = make(110, batch=1, states=4, **options)
    if not states:
        inputs["initial_state"] = None
    packed, finals = kernel(**inputs, cu_seqlens=BORDERS, output_final_state=states)
    rows = {part for part, x in inputs.items() if x is not None and x.dim() == 3}
    for n, (start, end) in enumerate(zip(BORDERS[:-1].tolist(), BORDERS[1:].tolist(), strict=True)):
        own = {part: x[:, start:end] if part in rows else x for part, x in inputs.items()}
        own["initial_state"] = inputs["initial_state"][n : n + 1] if states else None
        if start == end:
            assert not states or torch.equal(finals[n : n + 1], own["initial_state"])
            continue
        alone, final = kernel(**own, output_final_state=True)
        assert distance(packed[:, start:end], alone) < TOLERANCE
        assert not states or distance(finals[n : n + 1], final) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"lift": 3, "signed": True}], ids=str)
def test_a_step_equals_the_scans_next_token(options: dict[str, Any]) -> None:
    inputs = scan_inputs(9, "strong", **options)
    expected, final = selective_scan(**inputs, output_final_state=True)
    shared = {part: inputs[part] for part in ("D", "lift_gamma", "spectrum") if part in inputs}
    state = inputs["initial_state"].clone()
    for t in range(9):
        x, dt, B, C = (inputs[part][:, t] for part in ("x", "dt", "B", "C"))
        y = selective_scan_step(x, dt, inputs["A"], B, C, state, **shared)
        assert distance(y, expected[:, t]) < TOLERANCE
    assert distance(state, final) < TOLERANCE


def wide_inputs(tokens: int) -> dict[str, Tensor]:
    """Rows of 64 numbers a token, whose states have 256."""
    rows = {part: torch.rand(1, tokens, 16) for part in ("x", "dt", "B", "C")}
    return {part: x.requires_grad_() for part, x in (rows | {"A": -torch.rand(16, 16)}).items()}


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return result


@pytest.mark.parametrize("budget", [1 << 16, 1 << 24], ids=["small budget", "all in one segment"])
def test_states_of_all_tokens_are_never_held_beyond_the_budget(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Neither made at once, forward or backward, nor kept in pieces between the two."""
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", budget)
    inputs, saved = wide_inputs(512), 0

    def count(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel()
        return x

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            y, _ = selective_scan(**inputs)
        y.square().sum().backward()
    states_of_all_tokens = 512 * 256
    held = max(saved, largest.elements) >= states_of_all_tokens
    assert held is (budget == 1 << 24)


def test_the_form_for_the_compiler_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = hgrn_inputs(1100, "mixed")
    expected = hgrn(**inputs)[0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(hgrn(**inputs)[0], expected)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "log-decays above 0": (hgrn, {"log_decay": torch.full((2, 3, 5), 0.1)}, "at most 0"),
    "log-decays of another shape": (hgrn, {"log_decay": torch.zeros(2, 3, 4)}, r"\[2, 3, 5\]"),
    "a state of another shape": (hgrn, {"initial_state": torch.zeros(3, 5)}, "initial_state"),
    "no such backend": (hgrn, {"backend": "fast"}, "unknown backend 'fast'"),
    "A above 0": (selective_scan, {"A": torch.ones(6, 4)}, "A must be at most 0"),
    "steps below 0": (selective_scan, {"dt": -torch.ones(2, 3, 6)}, "softplus"),
    "gates that fit no lift": (selective_scan, {"lift_gamma": torch.zeros(1, 3)}, "lift_gamma"),
    "a spectrum beyond 1": (selective_scan, {"spectrum": torch.full((6,), 1.5)}, r"\[-1, 1\]"),
    "a lifted state without gates": (selective_scan, {"initial_state": torch.zeros(2, 1, 8, 6)}, "initial_state"),
}


@pytest.mark.parametrize("case", BAD)
def test_inputs_that_cannot_be_meant_are_refused(case: str) -> None:
    kernel, wrong, complaint = BAD[case]
    inputs = hgrn_inputs(3) if kernel is hgrn else scan_inputs(3)
    with pytest.raises(ValueError, match=complaint):
        kernel(**inputs | wrong)
