"""Cross-entropy behind a linear head: logits are made once, a piece at a time, and turned into their own gradient in place.

The products are cuBLAS's. Both gradients of a loss are known but for a factor when its logits are, so the forward pass makes them.
A row's softmax, loss and gradient are computed in float32; so is the weight's gradient, a sum over all pieces, whatever the
products take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import on_own_device, power_of_2

PIECE_BYTES = 1 << 29
"""Logits that exist at one time."""

ROWS = 256
"""A piece has a multiple of so many rows, so that the products fill whole tiles."""

BLOCK, WARPS = 8192, 8
"""Logits that a program holds at a time, and its warps."""

IGNORED = tl.constexpr(-100)

SCALE = 256.0
"""Factor on what waits for the backward pass: float16 keeps the digits of small gradients."""


@triton.jit
def score_rows(LOGITS, TARGETS, LOSSES, FACTOR, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """LOSSES = log Σ exp(logits) - the target's logit; LOGITS become factor · (softmax - 1 at the target). Grid: (rows,).

    Ignored rows get zeros; a target outside the vocabulary makes the row's loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    LOGITS += row * vocabulary
    cs = tl.arange(0, BLOCK)
    if target == IGNORED:
        tl.store(LOSSES + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros([BLOCK], LOGITS.dtype.element_ty)
            for start in range(0, vocabulary, BLOCK):
                tl.store(LOGITS + start + cs, zeros, mask=start + cs < vocabulary)
    else:
        known = (target >= 0) & (target < vocabulary)
        column = target.to(tl.int32)
        own = tl.load(LOGITS + target, mask=known, other=float("nan")).to(tl.float32)
        highest = float("-inf")
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            x = tl.load(LOGITS + start + cs, mask=start + cs < vocabulary, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(x, 0))
            sums = sums * tl.exp(highest - higher) + tl.exp(x - higher)
            highest = higher
        total = tl.sum(sums, 0)
        tl.store(LOSSES + row, tl.log(total) + (highest - own))
        if GRADIENT:
            factor = tl.load(FACTOR)
            share = factor / total
            for start in range(0, vocabulary, BLOCK):
                inside = start + cs < vocabulary
                x = tl.load(LOGITS + start + cs, mask=inside, other=float("-inf")).to(tl.float32)
                slope = tl.exp(x - highest) * share - tl.where(start + cs == column, factor, 0.0)
                tl.store(LOGITS + start + cs, slope.to(LOGITS.dtype.element_ty), mask=inside)


@on_own_device
def mean_loss(rows: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor | float) -> Tensor:
    """Cross-entropies of `softmax(rows · weightᵀ)` in nats, their sum over `divisor`; float32.

    The products are made in autocast's dtype where it is on. A gradient that nobody wants is not made.

    Args:
        rows: `[N, hidden]`.
        weight: `[vocabulary, hidden]`.
        targets: `[N]`, int64; -100 where no loss is wanted. One outside the vocabulary makes the loss NaN.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (rows, weight))
    if not isinstance(divisor, Tensor) or divisor.device != rows.device:
        divisor = torch.full((), float(divisor), device=rows.device)  # a copy to the device would make the host wait for it
    loss: Tensor = _LinearLoss.apply(rows, weight, targets.contiguous(), divisor.float(), dtype, wanted)
    return loss


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor, dtype: torch.dtype, wanted: tuple[bool, bool]
    ) -> Tensor:
        ctx.dtypes = rows.dtype, weight.dtype
        # What is left for the backward pass is a power of two, if the loss's factor is one: nothing is rounded twice.
        mantissa, _ = torch.frexp(divisor)
        factor = SCALE / mantissa
        with torch.autocast(rows.device.type, enabled=False):
            rows, weight = rows.to(dtype), weight.to(dtype)
            losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
            of_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if wanted[0] else None
            of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=rows.device) if wanted[1] else None
            size = _piece(len(rows), len(weight), dtype)
            logits = torch.empty(size, len(weight), dtype=dtype, device=rows.device)
            for start in range(0, len(rows), size):
                piece = rows[start : start + size]
                places = slice(start, start + len(piece))
                slopes = torch.mm(piece, weight.t(), out=logits[: len(piece)])
                score_rows[(len(piece),)](
                    slopes, targets[places], losses[places], factor, len(weight),
                    GRADIENT=any(wanted), BLOCK=min(BLOCK, power_of_2(len(weight))), num_warps=WARPS,
                )  # fmt: skip
                if of_rows is not None:
                    torch.mm(slopes, weight, out=of_rows[places])
                if of_weight is not None:
                    _add_product(of_weight, slopes, piece)
        ctx.save_for_backward(of_rows, of_weight, mantissa / divisor / SCALE)
        return losses.sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: a graph that is kept gives the same gradients again.
        *gradients, rest = ctx.saved_tensors
        factor = (factor * rest).reshape(1)  # PyTorch would round a scalar to the gradient's dtype
        of_rows, of_weight = (
            None if x is None else torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return of_rows, of_weight, None, None, None, None


def _piece(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows whose logits are made at a time."""
    fit = max(1, PIECE_BYTES // (vocabulary * dtype.itemsize))
    return max(1, min(rows, fit - fit % ROWS if fit > ROWS else fit))


def _add_product(total: Tensor, slopes: Tensor, rows: Tensor) -> None:
    """total += slopesᵀ · rows, `[N, vocabulary]` and `[N, hidden]`, in float32."""
    if slopes.dtype == torch.float32:
        total.addmm_(slopes.t(), rows)
    elif slopes.is_cuda and torch.version.hip is None:
        torch.addmm(total, slopes.t(), rows, out_dtype=torch.float32, out=total)
    else:  # there each piece's product is rounded
        total += slopes.t() @ rows
