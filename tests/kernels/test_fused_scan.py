"""The selective scan's Triton kernels against the float64 reference: in Triton's interpreter on a CPU, or as they are on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statex.kernels import selective_scan, triton_backend
from tests.kernels.inputs import DECAYS, distance, in_float64, log_decays, results

pytest.importorskip("triton")

from statex.kernels.fused import layout
from statex.kernels.fused import selective_scan as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
"""float32 throughout."""

NARROW_TOLERANCE = {torch.bfloat16: 3e-3 if DEVICE == "cuda" else 5e-3, torch.float16: 1e-3}
"""Every sum is float32, so only results are rounded, to 2^-9 or 2^-12; the interpreter cuts bfloat16 off where a GPU rounds."""

SHORT = 8
"""Tokens in a stretch, here: the interpreter is slow, and stretches must meet."""


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LENGTHS", (SHORT, SHORT))


def scan_inputs(
    tokens: int,
    decay: str = "mild",
    *,
    batch: int = 1,
    channels: int = 6,
    d_state: int = 4,
    states: int | None = None,
    lift: int = 1,
    signed: bool = False,
) -> dict[str, Any]:
    inputs = {
        "x": torch.randn(batch, tokens, channels),
        "dt": -log_decays(decay, batch, tokens, channels),
        "A": -0.5 - 0.5 * torch.rand(channels, d_state),
        "B": torch.randn(batch, tokens, d_state),
        "C": torch.randn(batch, tokens, d_state),
        "D": torch.randn(channels),
        "initial_state": torch.randn(states or batch, 1, lift * d_state, channels),
    }
    if lift > 1:
        inputs["lift_gamma"] = torch.randn(1, (lift - 1) * d_state)
    if signed:
        inputs["spectrum"] = 2 * torch.rand(channels) - 1
    return inputs


def on_device(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: x.to(DEVICE, dtype if name in ("x", "B", "C") else None) for name, x in inputs.items()}


def assert_results_match(inputs: dict[str, Any], tolerance: float = TOLERANCE, dtype: torch.dtype = torch.float32) -> None:
    rounded = {name: x.cpu() for name, x in on_device(inputs, dtype).items()}
    expected = results(selective_scan, in_float64(rounded), backend="reference")
    for name, found in results(selective_scan, on_device(inputs, dtype), backend="triton").items():
        assert distance(found.cpu(), expected[name]) < tolerance, name


def assert_values_match(inputs: dict[str, Any], **options: Any) -> None:
    expected = selective_scan(**in_float64(inputs), output_final_state=True, backend="reference", **options)
    found = selective_scan(**on_device(inputs), output_final_state=True, backend="triton", **on_device(options))
    for x, y in zip(found, expected, strict=True):
        assert x is not None
        assert y is not None
        assert distance(x.cpu(), y) < TOLERANCE


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a batch": {"batch": 3, "tokens": 11},
    "lifted": {"lift": 3},
    "below 0": {"signed": True},
    "lifted, below 0": {"lift": 2, "signed": True},
    "several channel blocks": {"channels": 70, "d_state": 16, "tokens": 10},
    "several number blocks": {"d_state": 40, "channels": 20, "tokens": 10, "signed": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_equals_the_references(form: str) -> None:
    sizes: dict[str, Any] = {"tokens": 21, "decay": "mixed"} | FORMS[form]
    assert_results_match(scan_inputs(**sizes))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("decay", [decay for decay in DECAYS if decay != "mixed"])
def test_gradients_stay_exact_however_strong_the_decays(decay: str, signed: bool) -> None:
    inputs = scan_inputs(18, decay, signed=signed)
    if decay == "none":
        inputs["dt"], inputs["A"] = torch.rand_like(inputs["dt"]), torch.zeros_like(inputs["A"])
    assert_results_match(inputs)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 33])
def test_any_length_equals_the_reference(tokens: int) -> None:
    assert_values_match(scan_inputs(tokens, "mixed", batch=2))


def test_long_stretches_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LENGTHS", (32, 128))
    assert_values_match(scan_inputs(150, "strong"))


@pytest.mark.parametrize("sizes", [{}, {"d_state": 40}], ids=str)
def test_scratch_that_holds_few_stretches_changes_nothing(sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SEGMENT_BYTES", 1)
    assert_results_match(scan_inputs(21, "mild", batch=2, **sizes))


def test_stretches_of_long_rows_fit_a_grid() -> None:
    most = layout.PROGRAMS
    for batch, tokens in ((1, 10), (1, 1 << 20), (3, 1 << 24), (60_000, 1000)):
        shape = fused._shape(batch, tokens, 6, 4)
        assert batch * shape.stretches <= most
        assert shape.stretches * shape.length == shape.padded_tokens >= tokens


def test_results_do_not_depend_on_what_scratch_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    make_empty, make_new = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: make_empty(*sizes, **options).fill_(torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *sizes, **options: make_new(x, *sizes, **options).fill_(torch.nan))
    assert_results_match(scan_inputs(21, "mixed", channels=33, d_state=16, signed=True))


@pytest.mark.parametrize("signed", [False, True])
def test_packed_sequences_do_not_meet(signed: bool) -> None:
    borders = torch.tensor([0, 1, 1, 12, 16, 21, 21])
    inputs = scan_inputs(21, "mild", states=6, signed=signed)
    assert_values_match(inputs, cu_seqlens=borders)
    del inputs["initial_state"]
    leaves, exact = ({name: x.requires_grad_() for name, x in each.items()} for each in (on_device(inputs), in_float64(inputs)))
    found, _ = selective_scan(**leaves, cu_seqlens=borders.to(DEVICE), backend="triton")
    expected, _ = selective_scan(**exact, cu_seqlens=borders, backend="reference")
    weights = torch.randn(expected.shape)
    (found * weights.to(DEVICE)).sum().backward()
    (expected * weights).sum().backward()
    assert distance(found.detach().cpu(), expected.detach()) < TOLERANCE
    for name, leaf in leaves.items():
        assert distance(leaf.grad.cpu(), exact[name].grad) < TOLERANCE, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_their_dtype_and_lose_only_the_rounding_of_results(dtype: torch.dtype) -> None:
    inputs = scan_inputs(21, "mild")
    output, state = selective_scan(**on_device(inputs, dtype), output_final_state=True, backend="triton")
    assert output.dtype == dtype
    assert state is not None
    assert state.dtype == torch.float32
    assert_results_match(inputs, NARROW_TOLERANCE[dtype], dtype)


def test_rows_in_any_memory_layout_and_without_skip_or_state_are_accepted() -> None:
    inputs = scan_inputs(13, batch=2)
    del inputs["D"], inputs["initial_state"]
    inputs["x"] = inputs["x"].mT.contiguous().mT
    inputs["dt"] = inputs["dt"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["B"], inputs["C"] = torch.randn(2, 13, 9).split((5, 4), -1)[0][..., 1:], torch.randn(2, 13, 8)[..., ::2]
    assert_results_match(inputs)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor):
                self.nbytes = max(self.nbytes, made.nbytes)
        return result


def test_states_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, channels, d_state = 32, 32, 16
    monkeypatch.setattr(layout, "SEGMENT_BYTES", 1)
    inputs = {name: x.requires_grad_() for name, x in on_device(scan_inputs(tokens, channels=channels, d_state=d_state)).items()}
    with LargestTensor() as largest:
        selective_scan(**inputs, backend="triton")[0].sum().backward()
    assert largest.nbytes <= 4 * tokens * channels * d_state // SHORT


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a GPU")
def test_auto_stays_with_pytorch_on_a_cpu_and_float64_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = scan_inputs(5)
    with pytest.raises(ValueError, match="'triton' has no float64; use auto or chunked"):
        selective_scan(**in_float64(inputs), backend="triton")
    monkeypatch.setattr(triton_backend, "MODULES", {})
    selective_scan(**inputs)
    with pytest.raises(ValueError, match=r"needs Triton \(pip install 'statex\[gpu\]'\)"):
        selective_scan(**inputs, backend="triton")
