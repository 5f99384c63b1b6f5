"""Whether the Triton kernels are there, and which calls they take. Nothing else of the package needs Triton."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

MODULES: dict[str, ModuleType] = {}
"""`gla` and `ssd` of the backend, `step` for one token; empty without Triton."""

INTERPRETED = False
"""Triton's interpreter is on: the kernels run on a CPU, slowly, for tests."""

try:
    from .fused import blocks, gla, ssd, step

    MODULES |= {"gla": gla, "ssd": ssd, "step": step}
    INTERPRETED = blocks.INTERPRETED
except ImportError:
    pass


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot take tensors like `x`, as a clause, or None."""
    if not MODULES:
        return "needs Triton (pip install 'statex[gpu]')"
    if not x.is_cuda and not INTERPRETED:
        return f"needs a CUDA device, and the tensors are on {x.device.type}"
    if x.dtype == torch.float64:
        return "has no float64"
    return None


def step_kernel(state: Tensor) -> ModuleType | None:
    """The one-token kernels, if they can update this state in place."""
    fits = state.is_cuda and state.dtype in (torch.float32, torch.bfloat16) and state.stride(-1) == 1
    return MODULES["step"] if MODULES and fits else None
