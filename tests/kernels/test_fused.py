"""The Triton kernels against the float64 reference: in Triton's interpreter on a CPU, or as they are on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statex.kernels import gla, gla_step, ssd, ssd_step, triton_backend
from statex.kernels.fused import layout
from tests.kernels.inputs import DECAYS, distance, gla_inputs, gradients, in_float64, results, ssd_inputs

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
"""float32 sums; the products of float32 operands are made from three TF32 ones on a GPU."""

NARROW_TOLERANCE = {torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2, torch.float16: 2e-3}
"""A handful of roundings of 2^-9 or 2^-11 each; the interpreter cuts bfloat16 off where a GPU rounds to the nearest."""

scaled_gla = functools.partial(gla, scale=0.4)
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "gla": (scaled_gla, gla_inputs),
    "ssd": (ssd, ssd_inputs),
}
FORMS = {
    "gla plain": ("gla", {}),
    "gla all, channel": ("gla", {"group": 2, "mixing": "channel", "lift": 2}),
    "gla scalar mixing": ("gla", {"mixing": "scalar"}),
    "gla lifted as far as keys reach": ("gla", {"key_dim": 10, "lift": 10, "mixing": "channel", "heads": 1}),
    "gla lifted, two channels": ("gla", {"key_dim": 2, "lift": 2}),
    "gla lifted, three channels": ("gla", {"key_dim": 3, "lift": 3}),
    "ssd groups, lift": ("ssd", {"lift": 3}),
    "ssd one group": ("ssd", {"groups": 1}),
    "ssd odd heads": ("ssd", {"groups": 1, "heads": 3}),
    "ssd wide heads": ("ssd", {"groups": 1, "heads": 1, "head_dim": 70}),
}


def on_device(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rows = ("q", "k", "v", "x", "B", "C")
    return {name: x.to(DEVICE, dtype if name in rows else None) for name, x in inputs.items()}


def assert_results_match(
    kernel: Callable[..., Any], inputs: dict[str, Any], tolerance: float, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    rounded = {name: x.cpu() for name, x in on_device(inputs, dtype).items()}
    expected = results(kernel, in_float64(rounded), backend="reference", **options)
    for name, found in results(kernel, on_device(inputs, dtype), backend="triton", **options).items():
        assert distance(found.cpu(), expected[name]) < tolerance, name


def assert_values_match(kernel: Callable[..., Any], inputs: dict[str, Any], tolerance: float, **options: Any) -> None:
    expected = kernel(**in_float64(inputs), output_final_state=True, backend="reference", **options)
    found = kernel(**on_device(inputs), output_final_state=True, backend="triton", **on_device(options))
    for x, y in zip(found, expected, strict=True):
        assert distance(x.cpu(), y) < tolerance


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_equals_the_references(form: str) -> None:
    name, sizes = FORMS[form]
    kernel, make = KERNELS[name]
    assert_results_match(kernel, make(130, "mixed", batch=1, **sizes), TOLERANCE)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("decay", [decay for decay in DECAYS if decay != "mixed"])
def test_gradients_stay_exact_however_strong_the_gates(name: str, decay: str) -> None:
    kernel, make = KERNELS[name]
    inputs = make(70, decay, batch=1)
    if decay == "none" and name == "ssd":
        inputs["dt"] = torch.rand_like(inputs["dt"])
        inputs["A"].zero_()
    assert_results_match(kernel, inputs, TOLERANCE)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 257])
def test_any_length_equals_the_reference(name: str, tokens: int) -> None:
    kernel, make = KERNELS[name]
    assert_values_match(kernel, make(tokens, "mixed", batch=1), TOLERANCE)


@pytest.mark.parametrize(("form", "tokens"), [("gla plain", 130), ("gla all, channel", 70), ("ssd one group", 130)])
def test_segments_follow_one_another_exactly(form: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes = FORMS[form]
    kernel, make = KERNELS[name]
    counts: list[int] = []

    def segments(*sizes: int) -> list[tuple[int, int]]:
        found = layout.segments(*sizes)
        counts.append(len(found))
        return found

    monkeypatch.setattr(layout, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(layout, "CHUNKS", (64, 64))
    monkeypatch.setattr(triton_backend.MODULES[name], "segments", segments)
    assert_results_match(kernel, make(tokens, "mild", **sizes), TOLERANCE)
    assert max(counts) == -(-tokens // 64)


def test_steep_channels_beside_mild_ones_are_exact() -> None:
    inputs = gla_inputs(130, "mixed", batch=1, heads=1, group=2, mixing="channel", lift=2)
    inputs["log_decay"][..., ::2] *= 1e-3
    assert_results_match(scaled_gla, inputs, TOLERANCE)


@pytest.mark.parametrize("form", ["gla plain", "gla all, channel", "ssd one group"])
def test_long_chunks_equal_the_reference_whatever_scratch_held_before(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes = FORMS[form]
    make_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: make_empty(*sizes, **options).fill_(torch.nan))
    monkeypatch.setattr(layout, "CHUNKS", (256, 256))
    kernel, make = KERNELS[name]
    one_head = {"heads": 1} if form == "gla all, channel" else {}  # the interpreter is slow
    assert_results_match(kernel, make(200, "mixed", batch=1, **sizes, **one_head), TOLERANCE)


@pytest.mark.parametrize("name", KERNELS)
def test_packed_sequences_do_not_meet(name: str) -> None:
    kernel, make = KERNELS[name]
    borders = torch.tensor([0, 1, 1, 70, 100, 101, 101])
    inputs = make(101, "mild", batch=1, states=6)
    assert_values_match(kernel, inputs, TOLERANCE, cu_seqlens=borders)
    del inputs["initial_state"]
    expected, _ = kernel(**in_float64(inputs), cu_seqlens=borders, backend="reference")
    found, _ = kernel(**on_device(inputs), cu_seqlens=borders.to(DEVICE), backend="triton")
    assert distance(found.cpu(), expected) < TOLERANCE


def test_minus_infinity_forgets_without_nan() -> None:
    inputs = gla_inputs(80, "mild", batch=1)
    inputs["log_decay"][:, 37] = -torch.inf
    assert_values_match(scaled_gla, inputs, TOLERANCE)
    found = gradients(scaled_gla, on_device(inputs), backend="triton")
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_their_dtype_and_the_accuracy_of_their_products(name: str, dtype: torch.dtype) -> None:
    kernel, make = KERNELS[name]
    inputs = make(70, "mild", batch=1)
    output, state = kernel(**on_device(inputs, dtype), output_final_state=True, backend="triton")
    assert output.dtype == dtype
    assert state.dtype == torch.float32
    assert_results_match(kernel, inputs, NARROW_TOLERANCE[dtype], dtype)


def test_rows_in_any_memory_layout_are_accepted() -> None:
    inputs = gla_inputs(70, "mild", batch=1)
    strange = {name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for name, x in inputs.items()}
    strange["v"] = strange["v"].mT.contiguous().mT
    assert_values_match(scaled_gla, strange, TOLERANCE)


STEP_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{form: case for form, case in FORMS.items() if form != "ssd wide heads"},
    "gla long keys": ("gla", {"key_dim": 150, "value_dim": 40}),
    "ssd wide heads": ("ssd", {"groups": 1, "d_state": 130, "head_dim": 70}),
}


@pytest.mark.parametrize("spectrum", [False, True])
@pytest.mark.parametrize("form", STEP_FORMS)
def test_one_token_updates_the_state_in_place_as_the_plain_step_does(
    form: str, spectrum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sizes = STEP_FORMS[form]
    _, make = KERNELS[name]
    step = functools.partial(gla_step, scale=0.4) if name == "gla" else ssd_step
    inputs = {
        key: x[:, 0] if key in ("q", "k", "v", "log_decay", "x", "dt", "B", "C") else x
        for key, x in make(1, "strong", **sizes).items()
    }
    if spectrum:
        inputs["spectrum"] = torch.rand(inputs["k"].shape[1:] if name == "gla" else inputs["A"].shape)
    state = inputs.pop("initial_state")
    expected_state = state.clone()
    expected = step(**inputs, state=expected_state)
    monkeypatch.setattr(triton_backend, "step_kernel", lambda state: triton_backend.MODULES["step"])
    monkeypatch.setattr("statex.kernels.step.step_kernel", lambda state: triton_backend.MODULES["step"])
    on = on_device(inputs)
    found_state = state.to(DEVICE)
    assert distance(step(**on, state=found_state).cpu(), expected) < TOLERANCE
    assert distance(found_state.cpu(), expected_state) < TOLERANCE


@pytest.mark.parametrize("form", ["gla all, channel", "ssd wide heads"])
def test_a_state_longer_than_a_tile_is_updated_piece_by_piece(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from statex.kernels.fused import step

    monkeypatch.setattr(step, "tile_of", lambda *_, **__: step.Tile(8, 16, 4, fetched=True, early=True))
    test_one_token_updates_the_state_in_place_as_the_plain_step_does(form, False, monkeypatch)


def test_a_rehearsed_pass_is_not_launched_and_rehearsed_once_forward_and_backward() -> None:
    from statex.kernels.fused import rows, together

    x, dout = torch.randn(1, 3, 1, 8, device=DEVICE), torch.randn(1, 1, 1, 3, 16, device=DEVICE)
    dx = torch.zeros_like(x)
    made = []

    class Pass:
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[int, int]:
            made.append("forward")
            rows.Rows(1, 2, 16, None, None).take_apart(*arguments)
            return 1, 2

        @staticmethod
        def backward(ctx: Any, *gradients: int) -> None:
            made.append(gradients)

    kind, other = object(), object()
    for _ in range(2):
        together.compile_pass(kind, Pass, (x, dout, dx), backward=True)
    together.compile_pass(other, Pass, (x, dout, dx), backward=False)
    assert made == ["forward", (1, 2), "forward"]
    assert not dx.any()
    Pass.forward(None, x, dout, dx)
    assert dx.all()


def test_a_rehearsal_that_finds_no_memory_is_left_out() -> None:
    from statex.kernels.fused import together

    class Pass:
        @staticmethod
        def forward(*_: Any) -> None:
            raise torch.OutOfMemoryError

    together.compile_pass(object(), Pass, (torch.zeros(1),), backward=True)
    assert together._rehearsing.get() is False


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a GPU")
def test_auto_stays_with_pytorch_on_a_cpu_and_float64_is_refused_by_name() -> None:
    inputs = in_float64(gla_inputs(5))
    with pytest.raises(ValueError, match="'triton' has no float64; use auto or chunked"):
        scaled_gla(**inputs, backend="triton")


def test_more_programs_than_a_grid_can_hold_are_refused_before_a_launch() -> None:
    inputs = gla_inputs(1, batch=1, heads=70_000, key_dim=1, value_dim=1)
    with pytest.raises(ValueError, match="70,000 programs, and CUDA allows 65,535: split the batch"):
        scaled_gla(**on_device(inputs), backend="triton")


def test_without_triton_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "MODULES", {})
    with pytest.raises(ValueError, match=r"needs Triton \(pip install 'statex\[gpu\]'\)"):
        scaled_gla(**gla_inputs(5), backend="triton")
