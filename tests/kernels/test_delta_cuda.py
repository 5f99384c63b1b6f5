"""The delta rule on a GPU: against the reference on the CPU, compiled, captured, and without waiting for the device."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from statex.kernels import delta_rule, triton_backend
from tests.kernels.delta_inputs import delta_inputs
from tests.kernels.inputs import distance, gradients, in_float64, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

rule = functools.partial(delta_rule, scale=0.4)
GATES = (None, "mild", "mixed")
RELEASED: dict[str, dict[str, Any]] = {
    "delta_net": {"key_dim": 128, "value_dim": 128, "decay": None},
    "gated_deltanet": {"key_dim": 256, "value_dim": 512, "decay": "mild"},
    "gated_deltanet, shared keys": {"key_dim": 128, "value_dim": 128, "heads": "shared keys", "decay": "strong"},
    "delta_net, merged": {"key_dim": 512, "value_dim": 128, "decay": None},
    "gated_deltanet, merged": {"key_dim": 1024, "value_dim": 256, "decay": "mild"},
    "delta_net, merged and lifted": {"key_dim": 2048, "value_dim": 128, "decay": None},
}
"""Heads of DeltaNet 1.3B and Gated DeltaNet 1.3B, as they are and after surgery."""

TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""A handful of roundings of 2^-9 in bfloat16; of float16, a handful of operands that TF32 products cut off after 10 bits."""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("decay", GATES)
def test_every_gradient_on_a_gpu_equals_the_references(decay: str | None, compiled: bool) -> None:
    inputs = delta_inputs(300, decay, heads="shared keys", key_dim=32, value_dim=48)
    expected = gradients(rule, in_float64(inputs), backend="reference")
    # The compiler leaves the Triton kernels as they are, and so two graphs around them.
    kernel = torch.compile(rule) if compiled else rule
    for name, gradient in gradients(kernel, {name: x.cuda() for name, x in inputs.items()}).items():
        assert distance(gradient.cpu(), expected[name]) < 2e-5, name


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("form", RELEASED)
def test_kernels_keep_their_accuracy_at_the_sizes_of_released_models(form: str, dtype: torch.dtype) -> None:
    inputs = delta_inputs(1000, batch=1, beta=1.0, **RELEASED[form])
    inputs = {name: x.to("cuda", dtype if name in ("q", "k", "v") else None) for name, x in inputs.items()}
    if reason := triton_backend.why_no_delta_rule(inputs["k"], inputs["v"]):
        pytest.skip(reason)
    expected = results(rule, in_float64(inputs))
    errors = {name: distance(x, expected[name]) for name, x in results(rule, inputs, backend="triton").items()}
    assert not {name: error for name, error in errors.items() if not error < TOLERANCES[dtype]}


@pytest.mark.parametrize("decay", GATES)
def test_forward_and_backward_never_wait_for_the_device(decay: str | None) -> None:
    inputs = {name: x.cuda() for name, x in delta_inputs(300, decay, batch=1).items() if name != "initial_state"}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    borders = torch.tensor([0, 70, 300], device="cuda")
    rule(**leaves)[0].sum().backward()  # the first call sets up libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rule(**leaves, cu_seqlens=borders)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("decay", GATES)
def test_a_captured_step_of_training_replays_with_new_inputs(decay: str | None) -> None:
    inputs = {name: x.cuda() for name, x in delta_inputs(130, decay).items()}
    static = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(rule(**static)[0].sum(), list(static.values()))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(rule(**static)[0].sum(), list(static.values()))
    fresh = {name: x.cuda() for name, x in delta_inputs(130, decay).items()}
    with torch.no_grad():
        for name, x in fresh.items():
            static[name].copy_(x)
    graph.replay()
    leaves = {name: x.requires_grad_() for name, x in fresh.items()}
    expected = torch.autograd.grad(rule(**leaves)[0].sum(), list(leaves.values()))
    for name, ours, theirs in zip(fresh, captured, expected, strict=True):
        assert distance(ours, theirs) < 1e-5, name
