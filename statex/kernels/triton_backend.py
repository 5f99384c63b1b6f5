"""Whether the Triton kernels are there, and which calls go to them. Nothing else of the package needs Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

MODULES: dict[str, ModuleType] = {}
"""`gla`, `ssd`, `selective_scan`, `delta` and `hgrn` of the backend, `step`, `delta_step` and `scan_step` for one token,
`pointwise`, `convolution` and `decay_gate` for what surrounds them, `linear_loss` for head and loss; empty without Triton."""

INTERPRETED = False
"""Triton's interpreter is on: the kernels run on a CPU, slowly, for tests."""

NEEDED = 0
"""Bytes of shared memory per block that `gla` and `ssd` take."""

try:
    from .fused import (
        blocks,
        convolution,
        decay_gate,
        delta,
        delta_step,
        gla,
        hgrn,
        layout,
        linear_loss,
        pointwise,
        scan_step,
        selective_scan,
        ssd,
        step,
    )

    MODULES |= {"gla": gla, "ssd": ssd, "selective_scan": selective_scan, "delta": delta, "hgrn": hgrn}
    MODULES |= {"step": step, "delta_step": delta_step, "scan_step": scan_step}
    MODULES |= {"pointwise": pointwise, "convolution": convolution, "decay_gate": decay_gate, "linear_loss": linear_loss}
    INTERPRETED, NEEDED = blocks.INTERPRETED, layout.SHARED_MEMORY
except ImportError:
    pass


def chosen(backend: str, names: Iterable[str], x: Tensor, obstacle: Callable[[], str | None]) -> str:
    """The backend, one of `names`, of a call on tensors like `x`; "auto" is "triton" on CUDA devices that meet no obstacle, else
    "chunked". Raises `ValueError` on a name that is none of them, and on "triton" where an obstacle is in its way."""
    if backend not in ("auto", *names):
        raise ValueError(f"unknown backend {backend!r}; choose one of auto, {', '.join(names)}")
    if backend == "triton" or (backend == "auto" and x.is_cuda):
        reason = obstacle()
        if reason is None:
            return "triton"
        if backend == "triton":
            raise ValueError(f"backend 'triton' {reason}; use auto or chunked")
    return "chunked" if backend == "auto" else backend


def why_not(x: Tensor, shared_memory: int | None = None) -> str | None:
    """Why kernels of so many bytes of shared memory (NEEDED by default) cannot take tensors like `x`, as a clause, or None."""
    needed = NEEDED if shared_memory is None else shared_memory
    if not MODULES:
        return "needs Triton (pip install 'statex[gpu]')"
    if not x.is_cuda and not INTERPRETED:
        return f"needs a CUDA device, and the tensors are on {x.device.type}"
    if x.dtype == torch.float64:
        return "has no float64"
    if x.is_cuda and _shared_memory(x.device) < needed:
        return f"needs a GPU with {needed >> 10} KiB of shared memory per block (A100, H100 and later), and {x.device} has less"
    return None


def why_no_delta_rule(k: Tensor, v: Tensor) -> str | None:
    """As `why_not`, for the delta rule with keys and values like these."""
    if not MODULES:
        return why_not(v)
    kernels = MODULES["delta"]
    if v.dtype != torch.float64 and k.shape[-1] > (longest := kernels.longest_key(v)):
        return f"takes the delta rule's keys up to {longest:,} channels with {v.dtype} values, got {k.shape[-1]:,}"
    return why_not(v, kernels.SHARED_MEMORY)


@cache
def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))  # ROCm has no such field


def step_kernel(state: Tensor, name: str = "step") -> ModuleType | None:
    """A module of one-token kernels, if they can update this state in place."""
    fits = state.is_cuda and state.dtype in (torch.float32, torch.bfloat16) and state.stride(-1) == 1 and state.numel() > 0
    return MODULES[name] if MODULES and fits else None
