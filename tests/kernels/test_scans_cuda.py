"""The elementwise recurrences on a GPU: against the reference on the CPU, compiled, captured, never waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statex.kernels import hgrn, selective_scan
from tests.kernels.graphs import captured
from tests.kernels.inputs import distance, gradients, in_float64, log_decays, results
from tests.kernels.test_fused_scan import scan_inputs as fused_scan_inputs
from tests.kernels.test_scans import hgrn_inputs, scan_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = {
    "hgrn": (hgrn, hgrn_inputs),
    "selective scan": (selective_scan, scan_inputs),
    "selective scan, lifted, below 0": (selective_scan, functools.partial(scan_inputs, lift=2, signed=True)),
}
RELEASED = {
    "mamba": {"channels": 4096, "d_state": 16},
    "mamba, widened": {"channels": 1536, "d_state": 64},
    "mamba, lifted, below 0": {"channels": 1536, "d_state": 16, "lift": 3, "signed": True},
    "mamba, odd channels": {"channels": 330, "d_state": 16},
}
"""Layers of Mamba 1.4B and 130M, expanded, and channels that fill no tile."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
"""Every sum is float32, so in bfloat16 only results are rounded, to 2^-9."""

every_case = pytest.mark.parametrize(("kernel", "make"), CASES.values(), ids=CASES)
Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("compiled", [False, True])
@every_case
def test_every_gradient_on_a_gpu_equals_the_references(kernel: Callable[..., Any], make: Make, compiled: bool) -> None:
    inputs = make(300, "mixed")
    expected = gradients(kernel, in_float64(inputs), backend="reference")
    # The compiler leaves Triton kernels of our own as they are, and makes two graphs around them.
    run = torch.compile(kernel) if compiled else kernel
    for name, gradient in gradients(run, {name: x.cuda() for name, x in inputs.items()}).items():
        assert distance(gradient.cpu(), expected[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("form", RELEASED)
def test_the_scans_kernels_keep_their_accuracy_at_the_sizes_of_released_models(form: str, dtype: torch.dtype) -> None:
    rows = ("x", "B", "C")
    inputs = fused_scan_inputs(1000, "mixed", batch=2, **RELEASED[form])
    inputs = {name: x.to("cuda", dtype if name in rows else None) for name, x in inputs.items()}
    expected = results(selective_scan, in_float64(inputs))
    errors = {name: distance(x, expected[name]) for name, x in results(selective_scan, inputs, backend="triton").items()}
    assert not {name: error for name, error in errors.items() if not error < TOLERANCES[dtype]}


HGRN_SHAPES = {"a batch": (4, 4096, 2048), "one row": (1, 20_000, 2048), "stretches": (2, 9000, 330), "few tokens": (3, 7, 2051)}
"""Layers of HGRN 1.3B, then channels that fill no tile, in stretches and in rows that begin at odd addresses."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", HGRN_SHAPES)
def test_hgrns_kernels_keep_their_accuracy_at_the_sizes_of_released_models(shape: str, dtype: torch.dtype) -> None:
    batch, tokens, channels = HGRN_SHAPES[shape]
    inputs = {
        "x": torch.randn(batch, tokens, channels, dtype=dtype, device="cuda"),
        "log_decay": log_decays("mixed", batch, tokens, channels).cuda(),
        "initial_state": torch.randn(batch, channels, device="cuda"),
    }
    expected = results(hgrn, in_float64(inputs), backend="chunked")
    errors = {name: distance(x, expected[name]) for name, x in results(hgrn, inputs, backend="triton").items()}
    assert not {name: error for name, error in errors.items() if not error < TOLERANCES[dtype]}


@every_case
def test_forward_and_backward_never_wait_for_the_device(kernel: Callable[..., Any], make: Make) -> None:
    leaves = {name: x.cuda().requires_grad_() for name, x in make(300, batch=1).items() if name != "initial_state"}
    borders = torch.tensor([0, 70, 300], device="cuda")
    kernel(**leaves)[0].sum().backward()  # the first call sets up libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(**leaves, cu_seqlens=borders)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_a_captured_step_of_training_replays_with_new_inputs(kernel: Callable[..., Any], make: Make) -> None:
    leaves = {name: x.cuda().requires_grad_() for name, x in make(100).items()}

    def step() -> None:
        for x in leaves.values():
            x.grad = None
        kernel(**leaves)[0].square().sum().backward()

    graph, _ = captured(step)
    fresh = make(100, "strong")
    with torch.no_grad():
        for name, x in leaves.items():
            x.copy_(fresh[name])
    graph.replay()
    got = {name: x.grad.cpu() for name, x in leaves.items()}
    step()
    for name, x in leaves.items():
        assert distance(got[name], x.grad.cpu()) < 1e-6, name
