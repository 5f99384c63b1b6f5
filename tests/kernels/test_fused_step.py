"""One token of the delta rule and of Mamba's scan by Triton kernels, in Triton's interpreter on a CPU, as is on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statex.kernels import delta_rule, delta_rule_step, selective_scan, selective_scan_step, triton_backend
from tests.kernels.delta_inputs import delta_inputs
from tests.kernels.inputs import distance, in_float64
from tests.kernels.test_fused_scan import scan_inputs

pytest.importorskip("triton")

from statex.kernels.fused import delta_step, scan_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""A state in bfloat16 is rounded to 2^-9 (the interpreter cuts it off, to 2^-8) after every token, four of them here."""

TOKENS = 4
ROWS = ("q", "k", "v", "beta", "log_decay", "x", "dt", "B", "C")
DELTA: dict[str, dict[str, Any]] = {
    "plain": {"decay": None},
    "gated": {"decay": "strong"},
    "heads that share keys and queries": {"heads": "both"},
    "keys and values of odd widths": {"key_dim": 20, "value_dim": 19},
}
SCAN: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd channels": {"channels": 70, "d_state": 16},
    "lifted": {"lift": 3},
    "lifted, below 0": {"lift": 2, "signed": True, "d_state": 5},
}
EVERY = [("delta rule", form) for form in DELTA] + [("selective scan", form) for form in SCAN]
"""Recurrence and form."""


@pytest.fixture(autouse=True)
def kernels_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_backend, "step_kernel", lambda _, name="step": triton_backend.MODULES[name])


def inputs_of(recurrence: str, form: str) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """What runs all tokens, what runs one, and inputs of both, states apart."""
    if recurrence == "delta rule":
        inputs = delta_inputs(TOKENS, **DELTA[form]) | {"scale": 0.4}
        return delta_rule, delta_rule_step, {"log_decay": None} | inputs
    return selective_scan, selective_scan_step, scan_inputs(TOKENS, "strong", batch=2, **SCAN[form])


def assert_steps_match(recurrence: str, form: str, dtype: torch.dtype = torch.float32) -> None:
    scan, step, inputs = inputs_of(recurrence, form)
    exact = in_float64({name: x for name, x in inputs.items() if isinstance(x, Tensor)})
    expected, final = scan(**inputs | exact, output_final_state=True, backend="reference")
    inputs = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    state = inputs.pop("initial_state").to(dtype)
    address = state.data_ptr()
    outputs = []
    for t in range(TOKENS):
        row = {name: x[:, t] if name in ROWS and x is not None else x for name, x in inputs.items()}
        outputs.append(step(**row, state=state))
    assert distance(torch.stack(outputs, 1).cpu(), expected) < TOLERANCE[dtype]
    assert distance(state.cpu(), final) < TOLERANCE[dtype]
    assert state.data_ptr() == address


@pytest.mark.parametrize(("recurrence", "form"), EVERY)
def test_steps_equal_the_reference_and_update_the_state_in_place(recurrence: str, form: str) -> None:
    assert_steps_match(recurrence, form)


@pytest.mark.parametrize(("recurrence", "form"), [("delta rule", "gated"), ("selective scan", "lifted, below 0")])
def test_a_narrow_state_is_rounded_once_a_token(recurrence: str, form: str) -> None:
    assert_steps_match(recurrence, form, torch.bfloat16)


def test_columns_longer_than_a_program_holds_are_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_step, "HELD", 128)
    assert delta_step.tile_of(8, 20, 19)[0] == 8
    assert_steps_match("delta rule", "keys and values of odd widths")
    monkeypatch.setattr(scan_step, "HELD", 128)
    assert scan_step.tile_of(2, 6, 12)[1] == 4
    assert_steps_match("selective scan", "lifted")


def test_results_have_the_dtype_of_the_values_and_rows_any_memory_layout() -> None:
    for recurrence, form, values in (("delta rule", "gated", "v"), ("selective scan", "plain", "x")):
        _, step, inputs = inputs_of(recurrence, form)
        state = inputs.pop("initial_state").to(DEVICE)
        row = {name: x[:, 0].to(DEVICE) if name in ROWS else x for name, x in inputs.items()}
        row = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in row.items()}
        expected, held = step(**row, state=state.clone()), state.clone()
        apart = {name: torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) else x for name, x in row.items()}
        spread = torch.zeros(*state.shape[:2], state.shape[2] * 2, state.shape[3], device=DEVICE)[:, :, ::2]
        spread.copy_(state)
        assert torch.equal(step(**apart, state=spread), expected)
        step(**row, state=held)
        assert torch.equal(spread, held)
        assert step(**row | {values: row[values].bfloat16()}, state=state).dtype == torch.bfloat16


RELEASED: dict[str, tuple[str, dict[str, int]]] = {
    "DeltaNet 1.3B": ("delta rule", {"heads": 16, "key_dim": 128, "value_dim": 128}),
    "Gated DeltaNet 1.3B": ("delta rule", {"heads": 6, "key_dim": 256, "value_dim": 512}),
    "DeltaNet, all heads merged": ("delta rule", {"heads": 1, "key_dim": 2048, "value_dim": 2048}),
    "DeltaNet, merged and lifted": ("delta rule", {"heads": 1, "key_dim": 4096, "value_dim": 512}),
    "Mamba 1.4B": ("selective scan", {"channels": 4096, "d_state": 16}),
    "Mamba, widened": ("selective scan", {"channels": 1536, "d_state": 128}),
    "Mamba, lifted": ("selective scan", {"channels": 4096, "d_state": 16, "lift": 4}),
}


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize("form", RELEASED)
def test_a_step_keeps_its_accuracy_at_the_sizes_of_released_models(form: str, batch: int) -> None:
    recurrence, sizes = RELEASED[form]
    if recurrence == "delta rule":
        H, K, V = sizes.values()
        unit = torch.nn.functional.normalize(torch.randn(2, batch, H, K, device=DEVICE), dim=-1)
        row = {"q": unit[0], "k": unit[1], "v": torch.randn(batch, H, V, device=DEVICE)}
        row |= {"beta": 2 * torch.rand(batch, H, device=DEVICE), "log_decay": -torch.rand(batch, H, device=DEVICE)}
        step, state = functools.partial(delta_rule_step, scale=0.4), torch.randn(batch, H, K, V, device=DEVICE)
    else:
        inputs = {name: x.to(DEVICE) for name, x in scan_inputs(1, "strong", batch=batch, signed=True, **sizes).items()}
        step, state = selective_scan_step, inputs.pop("initial_state")
        row = {name: x[:, 0] if name in ROWS else x for name, x in inputs.items()}
    held = state.double()
    expected = step(**in_float64(row), state=held)  # no kernel takes a state in float64
    assert distance(step(**row, state=state), expected) < TOLERANCE[torch.float32]
    assert distance(state, held) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("states", [1, 16, 1 << 12, 1 << 16])
def test_tiles_cover_states_of_every_size_within_what_a_program_holds(states: int) -> None:
    for key_dim in (1, 16, 100, 128, 1024, 2048, 9000):
        rows, columns, warps = delta_step.tile_of(states, key_dim, 512)
        assert rows * columns <= delta_step.HELD
        assert rows >= min(key_dim, 2048)
        assert 2 <= warps <= 16
        width, numbers, warps = scan_step.tile_of(states, 4096, key_dim)
        assert width * numbers <= scan_step.HELD
        assert 32 <= width <= 128
        assert 1 <= warps <= 8
