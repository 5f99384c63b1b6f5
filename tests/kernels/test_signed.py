"""Decays below 0: the signs that the chunked forms put on keys, queries and values, against the reference, which has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statex.kernels import chunking, gla, gla_step, ssd, ssd_step
from statex.kernels.signed import FLOOR, extended, signed_log, signs
from tests.kernels.inputs import DECAYS, distance, gla_inputs, gradients, in_float64, ssd_inputs
from tests.kernels.test_packed import BORDERS

TOLERANCE = 1e-5
REACHES = ("none", "to -1", "learned", "inwards")
"""s: 0; 1; anything from -1 to 1; -1, where every decay becomes 1."""


def reach(kind: str, *shape: int) -> Tensor:
    values = {"none": torch.zeros(shape), "to -1": torch.ones(shape), "inwards": -torch.ones(shape)}
    return values[kind] if kind in values else 2 * torch.rand(shape) - 1


def signed_gla(tokens: int, decay: str = "strong", kind: str = "learned", **form: Any) -> dict[str, Any]:
    inputs = gla_inputs(tokens, decay, **form)
    return inputs | {"spectrum": reach(kind, *inputs["k"].shape[2:])}


def signed_ssd(tokens: int, decay: str = "strong", kind: str = "learned", **form: Any) -> dict[str, Any]:
    inputs = ssd_inputs(tokens, decay, **form)
    return inputs | {"spectrum": reach(kind, inputs["x"].shape[2])}


scaled_gla = functools.partial(gla, scale=0.4)
Make = Callable[..., dict[str, Any]]
FORMS: dict[str, tuple[Callable[..., Any], Make]] = {
    "gla": (scaled_gla, signed_gla),
    "gla, grouped queries": (scaled_gla, functools.partial(signed_gla, group=2)),
    "gla, scalar mixing": (scaled_gla, functools.partial(signed_gla, mixing="scalar")),
    "gla, channel mixing, lift": (scaled_gla, functools.partial(signed_gla, group=2, mixing="channel", lift=3)),
    "gla, scalar mixing, lift": (scaled_gla, functools.partial(signed_gla, mixing="scalar", lift=2)),
    "ssd": (ssd, signed_ssd),
    "ssd, lift": (ssd, functools.partial(signed_ssd, lift=3)),
}
every_form = pytest.mark.parametrize(("kernel", "make"), FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", REACHES)
def test_signed_chunks_equal_the_reference(kernel: Callable[..., Any], make: Make, decay: str, kind: str) -> None:
    inputs = make(150, decay, kind)
    output, state = kernel(**inputs, output_final_state=True)
    expected, expected_state = kernel(**in_float64(inputs), output_final_state=True, backend="reference")
    assert distance(output, expected) < TOLERANCE
    assert distance(state, expected_state) < TOLERANCE


@every_form
@pytest.mark.parametrize("decay", ["mild", "strong"])
def test_every_signed_gradient_equals_the_references(kernel: Callable[..., Any], make: Make, decay: str) -> None:
    """In float64: the gradient of a logarithm near a' = 0 raises float32's rounding (FLOOR)."""
    inputs = in_float64(make(70, decay))
    expected = gradients(kernel, inputs, backend="reference")
    for name, gradient in gradients(kernel, inputs).items():
        assert distance(gradient, expected[name]) < 1e-9, name


@every_form
@pytest.mark.parametrize("segment_elements", [1, 1 << 40])
def test_signs_restart_at_every_border(
    kernel: Callable[..., Any], make: Make, segment_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", segment_elements)
    inputs, borders = make(BORDERS[-1], "strong", batch=1, states=len(BORDERS) - 1), torch.tensor(BORDERS)
    options = {"cu_seqlens": borders, "output_final_state": True}
    output, states = kernel(**inputs, **options)
    expected, expected_states = kernel(**in_float64(inputs), **options, backend="reference")
    assert distance(output, expected) < TOLERANCE
    assert distance(states, expected_states) < TOLERANCE


@every_form
def test_a_signed_row_may_be_cut_anywhere_and_carried_on(kernel: Callable[..., Any], make: Make) -> None:
    """The state that is handed on is the true one: no sign is carried along."""
    inputs = make(90, "strong", "to -1")
    whole, final = kernel(**inputs, output_final_state=True)
    state, parts = inputs.pop("initial_state"), []
    rows = {name for name, x in inputs.items() if x.dim() > 2 and name != "mixing"}
    for start, end in ((0, 1), (1, 37), (37, 90)):
        piece = {name: x[:, start:end] if name in rows else x for name, x in inputs.items()}
        part, state = kernel(**piece, initial_state=state, output_final_state=True)
        parts.append(part)
    assert distance(torch.cat(parts, 1), whole) < TOLERANCE
    assert distance(state, final) < TOLERANCE


def test_signed_steps_equal_signed_chunks() -> None:
    inputs = signed_gla(70, group=2, mixing="channel", lift=2)
    expected, final = scaled_gla(**inputs, output_final_state=True)
    state = inputs.pop("initial_state")
    fixed = {name: inputs.pop(name) for name in ("mixing", "lift_gamma", "spectrum")}
    steps = [gla_step(*(x[:, t] for x in inputs.values()), state, scale=0.4, **fixed) for t in range(70)]
    assert distance(torch.stack(steps, 1), expected) < TOLERANCE
    assert distance(state, final) < TOLERANCE
    inputs = signed_ssd(70, lift=2)
    expected, final = ssd(**inputs, output_final_state=True)
    state, A = inputs.pop("initial_state"), inputs.pop("A")
    fixed = {name: inputs.pop(name) for name in ("D", "lift_gamma", "spectrum")}
    x, dt, B, C = inputs.values()
    steps = [ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, **fixed) for t in range(70)]
    assert distance(torch.stack(steps, 1), expected) < TOLERANCE
    assert distance(state, final) < TOLERANCE


def test_a_decay_of_zero_forgets_the_past_and_nothing_after_it() -> None:
    """sign(0) is +1: as 0, it would wipe out every later token. With s = 1, a = 1/2 gives a' = 0 exactly."""
    inputs = {name: x.double() for name, x in signed_gla(40, "mild", "to -1").items()}
    inputs["log_decay"][:, 17] = torch.tensor(0.5, dtype=torch.float64).log()
    output, state = scaled_gla(**inputs, output_final_state=True)
    later = {name: x[:, 17:] if x.dim() == 4 and name != "initial_state" else x for name, x in inputs.items()}
    del later["initial_state"]
    alone, alone_state = scaled_gla(**later, output_final_state=True)
    assert distance(output[:, 17:], alone) < 10 * FLOOR
    assert distance(state, alone_state) < 10 * FLOOR


def test_the_floor_changes_outputs_by_its_own_size_at_most() -> None:
    """Every decay at 1/2, so that each a' is 0 and floored: against the recurrence without a floor, which keeps nothing."""
    inputs = {name: x.double() for name, x in signed_gla(40, "none", "to -1").items()}
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], 0.5).log()
    output, _ = scaled_gla(**inputs)
    exact = 0.4 * (inputs["q"] * inputs["k"]).sum(-1, keepdim=True) * inputs["v"]
    assert 0 < distance(output, exact) < 10 * FLOOR


def test_the_floor_is_straight_through() -> None:
    """The gradient of log|a'| is that of the logarithm at the floored a', on both sides of 0 and at it; a clamp's would be 0."""
    spectrum = torch.ones(3, dtype=torch.float64)
    decays = 0.5 + torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    log_decay = decays.log().requires_grad_()
    log, negative = signed_log(log_decay, spectrum)
    log.sum().backward()
    assert negative.tolist() == [True, False, False]
    assert torch.allclose(log, torch.full_like(log, FLOOR).log())
    sign = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(log_decay.grad, 2 * decays * sign / FLOOR)


@pytest.mark.parametrize("kind", REACHES)
def test_decays_and_their_logarithms_say_the_same_and_never_grow(kind: str) -> None:
    log_decay = -torch.logspace(-8, 2, 2001)
    spectrum = reach(kind, 2001)
    decay, (log, negative) = extended(log_decay, spectrum), signed_log(log_decay, spectrum)
    exact = extended(log_decay.double(), spectrum.double())
    assert bool((log <= 0).all())
    assert torch.equal(negative, decay < 0)
    assert float((decay - exact).abs().max()) < 2e-7
    assert float((log.double().exp() - exact.abs()).abs().max()) < 2e-7


def test_without_reach_slow_decays_keep_their_digits() -> None:
    log_decay = -torch.logspace(-8, 0, 100)
    log, _ = signed_log(log_decay, torch.zeros(100))
    assert float((log / log_decay - 1).abs().max()) < 1e-6


def test_running_signs_are_cumulative_products() -> None:
    negative = torch.rand(1, 50, 3) < 0.5
    factors = torch.where(negative, -1, 1)
    running, final = signs(negative)
    assert torch.equal(running, factors.cumprod(1))
    assert torch.equal(final, factors.prod(1))
    running, final = signs(negative, torch.tensor([0, 20, 20, 50]))
    assert torch.equal(running, torch.cat([factors[:, :20].cumprod(1), factors[:, 20:].cumprod(1)], 1))
    assert torch.equal(final, torch.stack([factors[0, :20].prod(0), torch.ones(3), factors[0, 20:].prod(0)]))


@pytest.mark.parametrize(("kernel", "make"), [FORMS["gla, channel mixing, lift"], FORMS["ssd"]])
def test_signed_kernels_compile_into_one_graph(kernel: Callable[..., Any], make: Make) -> None:
    inputs = make(70, "strong")
    compiled = torch.compile(lambda inputs: kernel(**inputs)[0], backend="eager", fullgraph=True)
    expected, _ = kernel(**in_float64(inputs), backend="reference")
    assert distance(compiled(inputs), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "make"), [FORMS["gla, channel mixing, lift"], FORMS["ssd"]])
def test_signed_outputs_come_in_the_dtype_of_the_inputs(kernel: Callable[..., Any], make: Make, dtype: torch.dtype) -> None:
    """Signs are exact in any dtype, so that the bound is that of one rounding of the output."""
    inputs = {name: x.to(dtype) for name, x in make(70, "mild", "learned").items()}
    output, state = kernel(**inputs, output_final_state=True)
    expected, _ = kernel(**in_float64(inputs), backend="reference")
    assert output.dtype == dtype
    assert state.dtype == torch.float32
    assert distance(output, expected) < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize(
    ("kernel", "make", "wrong", "message"),
    [
        (scaled_gla, signed_gla, torch.ones(2), r"spectrum must be \[2, 6\], got \[2\]"),
        (scaled_gla, signed_gla, torch.full((2, 6), 1.5), r"spectrum must lie in \[-1, 1\]"),
        (ssd, signed_ssd, torch.ones(2), r"spectrum must be \[4\], got \[2\]"),
    ],
)
def test_a_spectrum_that_cannot_be_is_refused(kernel: Callable[..., Any], make: Make, wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel(**make(8) | {"spectrum": wrong})
