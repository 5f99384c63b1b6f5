"""The gated recurrence of HGRN (arXiv 2311.04823), whose state is one number per channel, behind one call.

In PyTorch every token, or every stretch of them, is an operation of its own; on CUDA devices Triton kernels walk over the tokens
(`fused/hgrn.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference_scan, triton_backend
from .checks import check_hgrn
from .chunking import sequence_ids
from .elementwise import linear_scan
from .empty import empty_result
from .packed import run_in_buckets


def hgrn(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(log_decay_t) ∘ h_{t-1} + x_t, in float32 (float64 for float64 inputs) whatever autocast says.

    `torch.func` needs the reference, gradients of gradients the reference or the chunked form.

    Args:
        x: `[B, T, D]`, what is written: (1 - decay) ∘ value in HGRN.
        log_decay: `[B, T, D]`, nats, at most 0; -inf forgets everything.
        initial_state: `[N, D]`, zeros by default.
        output_final_state: also return the state after the last token.
        cu_seqlens: borders `[N + 1]` of N sequences packed into one row (B = 1), from 0 to T. States do not cross borders.
        backend: "auto" (Triton on CUDA devices, else chunked), "triton", "chunked" (any device) or "reference" (float64, one
            token at a time).

    Returns:
        h `[B, T, D]` in the dtype of `x`, and the final state `[N, D]` in float32 (float64), or None.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 (but for batch and T), shapes or devices that disagree,
            borders that do not run from 0 to T, a log-decay above 0, a backend that is unknown or cannot take them.
    """
    scan = _form(backend, x)
    state_shape = check_hgrn(x, log_decay, initial_state, cu_seqlens)
    if x.numel() == 0:
        return empty_result((x, log_decay), x.shape, state_shape, initial_state, output_final_state)
    with torch.autocast(x.device.type, enabled=False):
        if scan is None:
            return reference_scan.hgrn(
                x, log_decay, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
            )
        if cu_seqlens is None or (initial_state is None and not output_final_state):
            h, state = scan((x, log_decay), initial_state, cu_seqlens)
        else:
            h, state = run_in_buckets(scan, (x, log_decay), initial_state, cu_seqlens)
        return h, state if output_final_state else None


Form = Callable[..., tuple[Tensor, Tensor]]


def _form(backend: str, x: Tensor) -> Form | None:
    """What scans tensors like `x`; None is the reference. Raises `ValueError` where the backend is unknown or cannot."""
    forms = {"reference": None, "chunked": _scan, "triton": _fused_scan}
    return forms[triton_backend.chosen(backend, forms, x, lambda: triton_backend.why_not(x, shared_memory=0))]


def _fused_scan(rows: tuple[Tensor, ...], state: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, log_decay = rows
    h, final = triton_backend.MODULES["hgrn"].hgrn(x, log_decay, initial_state=state, cu_seqlens=cu_seqlens)
    return h, final


def _scan(rows: tuple[Tensor, ...], state: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, log_decay = rows
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    decay = log_decay.to(dtype).exp()
    if cu_seqlens is not None:
        ids = sequence_ids(cu_seqlens.to(x.device), x.shape[1])
        starts = torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ids.diff() != 0])
        decay = decay.masked_fill(starts[:, None], 0)
    initial = torch.zeros_like(decay[:, 0]) if state is None else state.to(dtype)
    h = linear_scan(decay, x.to(dtype), initial)
    return h.to(x.dtype), h[:, -1].clone()
