"""The chunked forms on a GPU, against the reference on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statex.kernels import gla, ssd
from tests.kernels.inputs import distance, gla_inputs, gradients, in_float64, ssd_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

scaled_gla = functools.partial(gla, scale=0.4)
CASES = [
    (scaled_gla, functools.partial(gla_inputs, group=2, mixing="scalar", lift=2)),
    (scaled_gla, functools.partial(gla_inputs, mixing="channel")),
    (ssd, functools.partial(ssd_inputs, lift=2)),
]


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.mark.parametrize(("kernel", "make"), CASES)
@pytest.mark.parametrize("decay", ["mild", "mixed"])
def test_every_gradient_on_a_gpu_equals_the_references(kernel: Callable[..., Any], make: Callable[..., Any], decay: str) -> None:
    inputs = make(150, decay)
    expected = gradients(kernel, in_float64(inputs), backend="reference")
    for name, gradient in gradients(kernel, on_gpu(inputs)).items():
        assert distance(gradient.cpu(), expected[name]) < 1e-5, name


@pytest.mark.parametrize(("kernel", "make"), CASES)
def test_packed_rows_on_a_gpu_equal_the_reference(kernel: Callable[..., Any], make: Callable[..., Any]) -> None:
    borders = torch.tensor([0, 1, 70, 140, 141])
    inputs = make(141, "mixed", batch=1, states=4)
    expected, expected_states = kernel(**in_float64(inputs), cu_seqlens=borders, output_final_state=True, backend="reference")
    output, states = kernel(**on_gpu(inputs), cu_seqlens=borders.cuda(), output_final_state=True)
    assert distance(output.cpu(), expected) < 1e-5
    assert distance(states.cpu(), expected_states) < 1e-5
