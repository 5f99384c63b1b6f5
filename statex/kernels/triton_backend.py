"""Whether the Triton kernels are there, and which calls they take. Nothing else of the package needs Triton."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

MODULES: dict[str, ModuleType] = {}
"""`gla` and `ssd` of the backend, `step` for one token; empty without Triton."""

INTERPRETED = False
"""Triton's interpreter is on: the kernels run on a CPU, slowly, for tests."""

NEEDED = 0
"""Bytes of shared memory per block."""

try:
    from .fused import blocks, gla, layout, ssd, step

    MODULES |= {"gla": gla, "ssd": ssd, "step": step}
    INTERPRETED, NEEDED = blocks.INTERPRETED, layout.SHARED_MEMORY
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
    if x.is_cuda and _shared_memory(x.device) < NEEDED:
        return f"needs a GPU with {NEEDED >> 10} KiB of shared memory per block (A100, H100 and later), and {x.device} has less"
    return None


@cache
def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))  # ROCm has no such field


def step_kernel(state: Tensor) -> ModuleType | None:
    """The one-token kernels, if they can update this state in place."""
    fits = state.is_cuda and state.dtype in (torch.float32, torch.bfloat16) and state.stride(-1) == 1
    return MODULES["step"] if MODULES and fits else None
