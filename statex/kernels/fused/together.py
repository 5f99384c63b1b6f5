"""Kernels compiled side by side before the first of them is launched, so that the first result does not wait for one after another.

A pass is rehearsed: it goes through its launches without launching anything. What a rehearsal leaves out, has no memory for or
cannot compile is compiled at its first launch, as always.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor

THREADS = min(16, os.cpu_count() or 1)

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)
_rehearsed: set[Hashable] = set()


class _Context:
    """What a `torch.autograd.Function` keeps for its backward pass."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`; in a rehearsal, what only compiles it."""
    return functools.partial(kernel.warmup, grid=grid) if _rehearsing.get() else kernel[grid]


@torch.no_grad()
def compile_pass(kind: Hashable, function: Any, arguments: tuple[Any, ...], *, backward: bool) -> None:
    """Compiles what `function`, a `torch.autograd.Function` whose first argument is a tensor, launches for these arguments.

    Once for every `kind` of arguments and device. Its backward pass is rehearsed with its outputs for gradients.
    """
    device = arguments[0].device
    if (kind, device) in _rehearsed or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    _rehearsed.add((kind, device))
    token = _rehearsing.set(True)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
                context = _Context()
                with contextlib.suppress(torch.OutOfMemoryError):  # of a backward pass that may never come
                    outputs = function.forward(context, *arguments)
                    if backward:
                        function.backward(context, *outputs)
            if device.type == "cuda":
                kernels = [found.kernel for found in mode.future_kernels.values() if found.kernel is not None]
                list(pool.map(functools.partial(_load, device), kernels))
    finally:
        _rehearsing.reset(token)


def _load(device: torch.device, kernel: Any) -> None:
    with torch.cuda.device(device):
        _ = kernel.run  # Triton builds what launches it
