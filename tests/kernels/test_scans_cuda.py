"""The elementwise recurrences on a GPU: against the reference on the CPU, compiled, captured, never waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statex.kernels import hgrn, selective_scan
from tests.kernels.inputs import distance, gradients, in_float64
from tests.kernels.test_scans import hgrn_inputs, scan_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = {
    "hgrn": (hgrn, hgrn_inputs),
    "selective scan": (selective_scan, scan_inputs),
    "selective scan, lifted, below 0": (selective_scan, functools.partial(scan_inputs, lift=2, signed=True)),
}
every_case = pytest.mark.parametrize(("kernel", "make"), CASES.values(), ids=CASES)
Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("compiled", [False, True])
@every_case
def test_every_gradient_on_a_gpu_equals_the_references(kernel: Callable[..., Any], make: Make, compiled: bool) -> None:
    inputs = make(300, "mixed")
    expected = gradients(kernel, in_float64(inputs), backend="reference")
    run = torch.compile(kernel, fullgraph=True) if compiled else kernel
    for name, gradient in gradients(run, {name: x.cuda() for name, x in inputs.items()}).items():
        assert distance(gradient.cpu(), expected[name]) < 1e-5, name


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

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    fresh = make(100, "strong")
    with torch.no_grad():
        for name, x in leaves.items():
            x.copy_(fresh[name])
    graph.replay()
    got = {name: x.grad.cpu() for name, x in leaves.items()}
    step()
    for name, x in leaves.items():
        assert distance(got[name], x.grad.cpu()) < 1e-6, name
