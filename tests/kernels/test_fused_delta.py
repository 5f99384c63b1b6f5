"""The delta rule's Triton kernels against the float64 reference: in Triton's interpreter on a CPU, or as they are on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from statex.kernels import delta_rule, triton_backend
from tests.kernels.delta_inputs import HEADS, delta_inputs
from tests.kernels.inputs import DECAYS, distance, gradients, in_float64, results

pytest.importorskip("triton")

from statex.kernels.fused import delta as fused
from statex.kernels.fused import layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
"""float32 sums; the products of float32 operands are made from three TF32 ones on a GPU. Seen: under 2e-6."""

NARROW_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 5e-3} if DEVICE == "cuda" else {torch.bfloat16: 3e-2, torch.float16: 2e-3}
"""A handful of roundings of 2^-9 or 2^-11 each, and more of those that cut off, whose errors all go one way: the interpreter's of
bfloat16, and a GPU's of the float32 operands between float16 inputs and outputs, of which TF32 products drop all but 10 bits."""

BORDERS = [0, 1, 1, 66, 70, 100, 100]

rule = functools.partial(delta_rule, scale=0.4)
reference = functools.partial(rule, backend="reference")
triton_rule = functools.partial(rule, backend="triton")


def on_device(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: x.to(DEVICE, dtype if name in ("q", "k", "v") else None) for name, x in inputs.items()}


def assert_results_match(
    inputs: dict[str, Any], tolerance: float = TOLERANCE, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    rounded = {name: x.cpu() for name, x in on_device(inputs, dtype).items()}
    expected = results(reference, in_float64(rounded), **options)
    found = results(triton_rule, on_device(inputs, dtype), **on_device(options))
    for name, x in found.items():
        assert distance(x.cpu(), expected[name]) < tolerance, name


def assert_values_match(inputs: dict[str, Any], tolerance: float = TOLERANCE, **options: Any) -> None:
    expected = reference(**in_float64(inputs), output_final_state=True, **options)
    found = triton_rule(**on_device(inputs), output_final_state=True, **on_device(options))
    for x, y in zip(found, expected, strict=True):
        assert x is not None
        assert y is not None
        assert distance(x.cpu(), y) < tolerance


@pytest.mark.parametrize(("heads", "decay"), [("both", None), *((heads, "mixed") for heads in HEADS)])
def test_every_gradient_equals_the_references(heads: str, decay: str | None) -> None:
    assert_results_match(delta_inputs(70, decay, heads=heads, batch=1))


@pytest.mark.parametrize("decay", [decay for decay in DECAYS if decay not in ("mixed", "mild")])
def test_gradients_stay_exact_however_strong_the_gates(decay: str) -> None:
    assert_results_match(delta_inputs(70, decay, batch=1))


@pytest.mark.parametrize(("tokens", "decay"), [(1, "mild"), (63, None), (64, "mild"), (65, "mild"), (130, None)])
def test_any_length_equals_the_reference(tokens: int, decay: str | None) -> None:
    assert_values_match(delta_inputs(tokens, decay, batch=1))


@pytest.mark.parametrize("sizes", [(70, 40), (130, 70), (320, 20)], ids=str)
def test_keys_and_values_of_any_size_equal_the_reference(sizes: tuple[int, int]) -> None:
    """One block of channels, several, held from reading to writing or not, with values of several blocks."""
    key_dim, value_dim = sizes
    assert_results_match(delta_inputs(70, "mild", batch=1, key_dim=key_dim, value_dim=value_dim))


def test_segments_follow_one_another_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SEGMENT_BYTES", 1)
    assert_results_match(delta_inputs(130, "mixed", batch=1))


@pytest.mark.parametrize(("budget", "segments"), [(1, 3), (1 << 30, 1)])
def test_of_several_segments_only_the_first_states_are_kept(budget: int, segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SEGMENT_BYTES", budget)
    inputs = {name: x.requires_grad_() for name, x in on_device(delta_inputs(130, None, batch=1)).items()}
    kept: list[tuple[int, ...]] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        triton_rule(**inputs)
    states, states_of_all_chunks, pairs = (1, 2, 64, 32), (2, 3, 64, 32), (2, 192, 64)
    found = [kept.count(shape) for shape in (states, states_of_all_chunks, pairs)]
    assert found == ([segments, 0, 0] if segments > 1 else [0, 1, 2])


@pytest.mark.parametrize("decay", [None, "mixed"])
def test_results_do_not_depend_on_what_scratch_held_before(decay: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: make_empty(*sizes, **options).fill_(torch.nan))
    assert_results_match(delta_inputs(70, decay, batch=1, key_dim=70))


def test_packed_rows_with_states_of_their_own_equal_the_reference() -> None:
    inputs, borders = delta_inputs(BORDERS[-1], "strong", batch=1, states=len(BORDERS) - 1), torch.tensor(BORDERS)
    expected = gradients(reference, in_float64(inputs), cu_seqlens=borders)
    for name, gradient in gradients(triton_rule, on_device(inputs), cu_seqlens=borders.to(DEVICE)).items():
        assert distance(gradient.cpu(), expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("decay", [None, "mild"])
def test_packed_rows_equal_the_reference_and_no_gradient_crosses_a_border(decay: str | None) -> None:
    inputs, borders = delta_inputs(BORDERS[-1], decay, heads="both", batch=1), torch.tensor(BORDERS)
    del inputs["initial_state"]
    leaves, exact = ({name: x.requires_grad_() for name, x in each.items()} for each in (on_device(inputs), in_float64(inputs)))
    found, _ = triton_rule(**leaves, cu_seqlens=borders.to(DEVICE))
    expected, _ = reference(**exact, cu_seqlens=borders)
    assert distance(found.detach().cpu(), expected.detach()) < TOLERANCE
    start, end = 1, 66
    found[:, start:end].square().sum().backward()
    expected[:, start:end].square().sum().backward()
    for name, leaf in leaves.items():
        assert distance(leaf.grad.cpu(), exact[name].grad) < TOLERANCE, name
        assert leaf.grad[:, :start].abs().max() == 0, name
        assert leaf.grad[:, end:].abs().max() == 0, name


def test_minus_infinity_forgets_everything_without_nan() -> None:
    inputs = delta_inputs(80, batch=1)
    inputs["log_decay"][:, 37] = -torch.inf
    o, state = triton_rule(**on_device(inputs), output_final_state=True)
    later = {name: x[:, 37:] for name, x in inputs.items() if name != "initial_state"}
    alone, alone_state = triton_rule(**on_device(later), output_final_state=True)
    assert state is not None
    assert alone_state is not None
    assert distance(o[:, 37:], alone) < TOLERANCE
    assert distance(state, alone_state) < TOLERANCE
    assert all(torch.isfinite(gradient).all() for gradient in gradients(triton_rule, on_device(inputs)).values())


def test_repeated_keys_that_are_always_flipped_stay_accurate() -> None:
    """The worst case for the inverse: few distinct keys, eigenvalues at -1. Its Neumann series would lose all digits here."""
    inputs = delta_inputs(256, None, key_dim=16, batch=1)
    inputs["k"] = inputs["k"][:, torch.randint(3, (256,))]
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    assert_values_match(inputs, 1e-4)


@pytest.mark.parametrize(("dtype", "decay"), [(torch.bfloat16, "mild"), (torch.float16, None)])
def test_narrow_inputs_keep_their_dtype_and_their_accuracy(dtype: torch.dtype, decay: str | None) -> None:
    inputs = delta_inputs(70, decay, batch=1, key_dim=32, value_dim=24)
    output, state = triton_rule(**on_device(inputs, dtype), output_final_state=True)
    assert output.dtype == dtype
    assert state is not None
    assert state.dtype == torch.float32
    assert_results_match(inputs, NARROW_TOLERANCE[dtype], dtype)


def test_wide_queries_and_keys_go_with_narrow_values() -> None:
    inputs = delta_inputs(70, "mild", heads="shared keys", batch=1, key_dim=32, value_dim=24)
    expected = gradients(reference, in_float64(inputs))
    inputs["v"] = inputs["v"].bfloat16()
    for name, gradient in gradients(triton_rule, {name: x.to(DEVICE) for name, x in inputs.items()}).items():
        assert gradient.dtype == inputs[name].dtype
        assert distance(gradient.cpu(), expected[name]) < NARROW_TOLERANCE[torch.bfloat16], name


def test_rounded_keys_keep_the_eigenvalue_minus_one() -> None:
    """Closed form: 1,023 flips of one sign. Keys that were rounded and not corrected would make the state grow or vanish."""
    tokens, key = 1023, torch.nn.functional.normalize(torch.tensor([0.3, 0.51, -0.77, 0.1]), dim=0)
    k = key.expand(1, tokens, 1, 4)
    inputs = {"q": k, "k": k, "v": torch.zeros(1, tokens, 1, 16).bfloat16(), "beta": torch.full((1, tokens, 1), 2.0)}
    inputs["initial_state"] = key[:, None].expand(1, 1, 4, 16).clone()
    _, state = triton_rule(**{name: x.to(DEVICE) for name, x in inputs.items()}, output_final_state=True)
    assert state is not None
    assert distance(state.cpu(), -inputs["initial_state"]) < 3e-2


def test_rows_in_any_memory_layout_and_without_a_state_are_accepted() -> None:
    inputs = delta_inputs(70, "mild", batch=1, key_dim=64, value_dim=32)
    del inputs["initial_state"]
    inputs["q"] = inputs["q"].mT.contiguous().mT
    inputs["k"] = inputs["k"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["v"] = torch.randn(1, 70, 2, 40)[..., 3:35]
    inputs["beta"] = inputs["beta"].mT.contiguous().mT
    assert_results_match(inputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a GPU")
def test_auto_stays_with_pytorch_on_a_cpu_and_what_kernels_cannot_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = delta_inputs(5)
    with pytest.raises(ValueError, match="'triton' has no float64; use auto or chunked"):
        triton_rule(**in_float64(inputs))
    longest = fused.longest_key(inputs["v"])
    with pytest.raises(ValueError, match=f"keys up to {longest:,} channels with torch.float32 values, got {longest + 1:,}"):
        triton_rule(**delta_inputs(2, key_dim=longest + 1))
    monkeypatch.setattr(triton_backend, "MODULES", {})
    rule(**inputs)
    with pytest.raises(ValueError, match=r"needs Triton \(pip install 'statex\[gpu\]'\)"):
        triton_rule(**inputs)
