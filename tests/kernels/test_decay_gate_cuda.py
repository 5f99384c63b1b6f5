"""The decay gate on a GPU at the size of GLA-1.3B: against float64, captured, and without waiting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statex.kernels.pointwise import low_rank_log_decay
from tests.kernels.inputs import distance, in_float64
from tests.kernels.test_decay_gate import NARROW, gate_inputs, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OF_ROWS = {torch.float32: 1e-5} | NARROW
"""For the gradient of the rows, which is rounded to their dtype."""

SIZES = {
    "GLA-1.3B": {"tokens": 4096, "hidden": 2048, "channels": 1024},
    "clamped": {"tokens": 4096, "hidden": 2048, "channels": 1024, "least": -0.05},
    "nothing even": {"tokens": 2049, "hidden": 1021, "channels": 517, "rank": 13},
    "the highest rank": {"tokens": 2100, "hidden": 512, "channels": 256, "rank": 64},
    "a rank that only PyTorch takes": {"tokens": 1000, "hidden": 512, "channels": 256, "rank": 80},
    "one token": {"tokens": 1, "hidden": 2048, "channels": 1024},
}


def on_gpu(dtype: torch.dtype, **sizes: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    inputs, options = gate_inputs(**sizes)
    return {name: x.to("cuda", dtype if name == "x" else None) for name, x in inputs.items()}, options


@pytest.mark.parametrize("dtype", OF_ROWS, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_log_decays_and_their_gradients_are_float32_exact(name: str, dtype: torch.dtype) -> None:
    inputs, options = on_gpu(dtype, **SIZES[name])
    exact = in_float64(inputs)
    with torch.no_grad():  # the bound is left out: on which side of it a number falls is a matter of its last digit
        free = low_rank_log_decay(**exact, normalizer=options["normalizer"])
    counted = (free - options.get("least", -1e9)).abs() > 1e-5
    expected = results(exact, options, counted=counted)
    far = {}
    for key, x in results(inputs, options, counted=counted).items():
        error = distance(x, expected[key])
        if not error < (OF_ROWS[dtype] if key == "x" else 1e-5):
            far[key] = error
    assert not far


@torch.no_grad()
def test_no_number_of_many_is_far_from_float64() -> None:
    """The worst of eight million: log-decays of a channel are summed over thousands of tokens."""
    inputs, options = on_gpu(torch.bfloat16, **SIZES["GLA-1.3B"])
    torch.testing.assert_close(
        low_rank_log_decay(**inputs, **options).double(), low_rank_log_decay(**in_float64(inputs), **options), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("tokens", [1, 2100])
@torch.no_grad()
def test_a_captured_gate_replays_with_new_rows(tokens: int) -> None:
    inputs, options = on_gpu(torch.bfloat16, tokens=tokens, hidden=2048, channels=1024)
    low_rank_log_decay(**inputs, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = low_rank_log_decay(**inputs, **options)
    inputs["x"].copy_(torch.randn_like(inputs["x"]))
    graph.replay()
    torch.testing.assert_close(captured, low_rank_log_decay(**inputs, **options))


def test_the_gate_and_its_gradients_never_wait_for_the_device() -> None:
    inputs, options = on_gpu(torch.bfloat16, tokens=2100)
    results(inputs, options)  # the first call compiles and sets up libraries
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        low_rank_log_decay(**leaves, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_gate_equals_the_kernels() -> None:
    inputs, options = on_gpu(torch.bfloat16, tokens=300)
    compiled = torch.compile(low_rank_log_decay)
    assert distance(compiled(**inputs, **options), low_rank_log_decay(**inputs, **options)) < 1e-5
