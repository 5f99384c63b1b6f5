"""Activation checkpointing makes a kernel's saved tensors again in the backward pass, and hands each out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from statex.kernels import delta_rule, gla, hgrn, selective_scan, ssd
from tests.kernels.delta_inputs import delta_inputs
from tests.kernels.inputs import gla_inputs, ssd_inputs
from tests.kernels.test_fused_scan import scan_inputs
from tests.kernels.test_scans import hgrn_inputs

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CALLS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "gla": (gla, gla_inputs, {}),
    "gla, lifted and mixed": (gla, gla_inputs, {"lift": 2, "mixing": "channel"}),
    "ssd": (ssd, ssd_inputs, {}),
    "delta rule": (delta_rule, delta_inputs, {}),
    "selective scan": (selective_scan, scan_inputs, {}),
    "hgrn": (hgrn, hgrn_inputs, {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_checkpointed_call_has_the_same_gradients(name: str) -> None:
    kernel, make, options = CALLS[name]
    inputs = make(20, batch=1, **options)
    scale = {} if kernel in (ssd, selective_scan, hgrn) else {"scale": 0.5}

    def outputs(*leaves: torch.Tensor) -> torch.Tensor:
        return kernel(**dict(zip(inputs, leaves, strict=True)), **scale, backend="triton")[0]

    leaves = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    expected = torch.autograd.grad(outputs(*leaves).square().sum(), leaves)
    found = torch.autograd.grad(checkpoint(outputs, *leaves, use_reentrant=False).square().sum(), leaves)
    for leaf, ours, theirs in zip(inputs, found, expected, strict=True):
        assert torch.equal(ours, theirs), leaf
