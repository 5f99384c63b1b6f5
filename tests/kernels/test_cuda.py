"""Calls on a GPU against the reference on the CPU, and at the sizes of released models against `chunked` in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statex.kernels import gla, ssd
from tests.kernels.inputs import distance, gla_inputs, gradients, in_float64, results, ssd_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

scaled_gla = functools.partial(gla, scale=0.4)
CASES = [
    (scaled_gla, functools.partial(gla_inputs, group=2, mixing="scalar", lift=2)),
    (scaled_gla, functools.partial(gla_inputs, mixing="channel")),
    (ssd, functools.partial(ssd_inputs, lift=2)),
]

one_ssd_group = functools.partial(ssd_inputs, batch=1, groups=1)
merged_gla = functools.partial(gla_inputs, batch=1, heads=1, key_dim=1024, value_dim=2048)
RELEASED: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "gla merged": (functools.partial(gla, scale=1024**-0.5), merged_gla),
    "gla merged, channel mixing": (
        functools.partial(gla, scale=256**-0.5),
        functools.partial(merged_gla, mixing="channel", blocks=4),
    ),
    "gla merged, scalar mixing": (
        functools.partial(gla, scale=256**-0.5),
        functools.partial(merged_gla, mixing="scalar", blocks=4),
    ),
    "gla lifted": (
        functools.partial(gla, scale=256**-0.5),
        functools.partial(gla_inputs, batch=1, heads=4, key_dim=256, value_dim=512, lift=4),
    ),
    "ssd": (ssd, functools.partial(one_ssd_group, heads=64, d_state=512, head_dim=64)),
    "ssd lifted": (ssd, functools.partial(one_ssd_group, heads=64, d_state=128, head_dim=64, lift=4)),
    "ssd odd heads": (ssd, functools.partial(one_ssd_group, heads=5, d_state=512, head_dim=64)),
    "ssd wide heads": (ssd, functools.partial(one_ssd_group, heads=16, d_state=512, head_dim=128)),
}
"""Expanded layers of GLA-1.3B and Mamba2-1.3B, and other forms of SSD: an odd number of heads, and wide ones."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
DECAY_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""For gradients of what decays are made of: `log_decay`, `dt` and `A`."""


def on_gpu(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rows = ("q", "k", "v", "x", "B", "C")
    return {name: x.to("cuda", dtype if name in rows else None) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("form", RELEASED)
def test_kernels_keep_their_accuracy_at_the_sizes_of_released_models(form: str, dtype: torch.dtype) -> None:
    kernel, make = RELEASED[form]
    inputs = on_gpu(make(1000), dtype)
    expected = results(kernel, in_float64(inputs), backend="chunked")
    far = {}
    for name, x in results(kernel, inputs, backend="triton").items():
        decays = name in ("log_decay", "dt", "A")
        error = distance(x, expected[name])
        if not error < (DECAY_TOLERANCES if decays else TOLERANCES)[dtype]:
            far[name] = error
    assert not far


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
