"""Several sequences in one row: none sees another, whatever their lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statex.kernels import chunking, gla, ssd
from tests.kernels.inputs import distance, gla_inputs, gradients, in_float64, ssd_inputs

BORDERS = [0, 1, 2, 66, 130, 131, 193, 193, 320, 321]
"""Lengths 1 in front, inside and at the end; 64 and 62 across chunk borders; an empty one; a long one."""

scaled_gla = functools.partial(gla, scale=0.4)
KERNELS = [
    (scaled_gla, functools.partial(gla_inputs, group=2)),
    (scaled_gla, functools.partial(gla_inputs, mixing="scalar", lift=2)),
    (scaled_gla, functools.partial(gla_inputs, mixing="channel")),
    (ssd, functools.partial(ssd_inputs, lift=2)),
]


def packed(make: Callable[..., dict[str, Any]], decay: str) -> tuple[dict[str, Any], Tensor]:
    return make(BORDERS[-1], decay, batch=1, states=len(BORDERS) - 1), torch.tensor(BORDERS)


@pytest.mark.parametrize(("kernel", "make"), KERNELS)
@pytest.mark.parametrize("decay", ["none", "mild", "mixed"])
@pytest.mark.parametrize("segment_elements", [1, 1 << 40])
def test_packed_rows_equal_the_reference(
    kernel: Callable[..., Any], make: Callable[..., Any], decay: str, segment_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", segment_elements)
    inputs, borders = packed(make, decay)
    del inputs["initial_state"]
    output, _ = kernel(**inputs, cu_seqlens=borders)
    expected, _ = kernel(**in_float64(inputs), cu_seqlens=borders, backend="reference")
    assert distance(output, expected) < 1e-5


@pytest.mark.parametrize(("kernel", "make"), KERNELS)
def test_packed_rows_with_states_equal_the_reference(kernel: Callable[..., Any], make: Callable[..., Any]) -> None:
    inputs, borders = packed(make, "mixed")
    output, states = kernel(**inputs, cu_seqlens=borders, output_final_state=True)
    expected, expected_states = kernel(**in_float64(inputs), cu_seqlens=borders, output_final_state=True, backend="reference")
    assert distance(output, expected) < 1e-5
    assert distance(states, expected_states) < 1e-5


@pytest.mark.parametrize(("kernel", "make"), KERNELS)
def test_gradients_of_packed_rows_with_states_equal_the_references(kernel: Callable[..., Any], make: Callable[..., Any]) -> None:
    inputs, borders = packed(make, "strong")
    expected = gradients(kernel, in_float64(inputs), cu_seqlens=borders, backend="reference")
    for name, gradient in gradients(kernel, inputs, cu_seqlens=borders).items():
        assert distance(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize(("kernel", "make"), KERNELS)
@pytest.mark.parametrize("segment_elements", [1, 1 << 40])
def test_no_gradient_crosses_a_border(
    kernel: Callable[..., Any], make: Callable[..., Any], segment_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", segment_elements)
    inputs, borders = packed(make, "mild")
    del inputs["initial_state"]
    rows = {name: x.requires_grad_() for name, x in inputs.items() if x.dim() > 2 and x.shape[1] == BORDERS[-1]}
    start, end = 131, 193
    kernel(**inputs, cu_seqlens=borders)[0][:, start:end].sum().backward()
    for name, x in rows.items():
        inside = x.grad[:, start:end].abs().max()
        # Decays of neighbours enter factors that cancel, exp(a) · exp(-a): their gradient is 0 up to rounding.
        allowed = 1e-5 * inside if name in ("log_decay", "dt") else 0
        assert inside > 0, name
        assert x.grad[:, :start].abs().max() <= allowed, name
        assert x.grad[:, end:].abs().max() <= allowed, name


def test_another_sequences_tokens_change_no_bit() -> None:
    inputs, borders = packed(gla_inputs, "mild")
    del inputs["initial_state"]
    before, _ = scaled_gla(**inputs, cu_seqlens=borders)
    for name in ("q", "k", "v"):
        inputs[name][:, 66:130] = 1e3
    after, _ = scaled_gla(**inputs, cu_seqlens=borders)
    assert torch.equal(before[:, :66], after[:, :66])
    assert torch.equal(before[:, 130:], after[:, 130:])
