"""The decay gate of gated linear attention: log-decays through a product of low rank, one pass over memory forward and backward.

Same calls and results as the PyTorch form in `statex.kernels.pointwise`. Log-decays are summed over thousands of tokens, so they
are float32; yet bfloat16 rows are not cast, but multiplied with bfloat16 pieces of the weight that add up to it. For the backward
pass the rows and their product z with `down`, `rank` numbers a token, are kept; gates are made again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import dot
from .layout import Launch, ceil_div, on_own_device, power_of_2, unit_stride

MOST_RANK = 64
"""A program holds the whole rank."""

FORWARD, BACKWARD = Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)
"""Tiles of the gates. Gradients are multiplied in bfloat16 halves: float32's own products took half as long again."""

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4096, 1056
"""Programs that share rows and channels; in the backward pass they leave sums for weights, each its own."""

FEW = 4096
"""For so many rows a cast costs less than cutting the weight."""

BLOCK = 1024
"""Numbers that a program cuts."""


@triton.jit
def log_sigmoid(gates):
    """min(g, 0) - log(1 + u) with u = exp(-|g|), and log(1 + u) = 2 artanh(s) with s = u / (2 + u) ≤ 1/3.

    The series is exact to float32's last digits however small u is.
    """
    u = tl.exp(-tl.abs(gates))
    s = u / (2.0 + u)
    q = s * s
    series = 2.0 + q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13))))))
    return tl.minimum(gates, 0.0) - s * series


@triton.jit
def halves(x):
    """Two bfloat16 numbers that add up to x but for 2^-17 of it."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_halves(a_high, a_low, b_high, b_low, acc):
    """acc + (a_high + a_low) @ (b_high + b_low), but for the product of both low halves."""
    acc = dot(a_low, b_high, acc, "ieee")
    acc = dot(a_high, b_low, acc, "ieee")
    return dot(a_high, b_high, acc, "ieee")


@triton.jit
def log_decays(
    Z, UP, BIAS, OUT, rows, channels, factor, least,
    RANK: tl.constexpr, CLAMPED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """OUT = factor · log σ(z · up + bias), at least `least`. Grid: (channels / BC, programs)."""
    ts, cs, rs = tl.arange(0, ROWS), tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BR)
    there, ranked = cs < channels, rs < RANK
    up = tl.load(UP + cs[None, :] * RANK + rs[:, None], mask=ranked[:, None] & there[None, :], other=0.0).to(tl.float32)
    bias = tl.load(BIAS + cs, mask=there, other=0.0).to(tl.float32)
    for start in range(tl.program_id(1).to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        inside = ts < rows - start
        z = tl.load(Z + start * RANK + ts[:, None] * RANK + rs[None, :], mask=inside[:, None] & ranked[None, :], other=0.0)
        gates = tl.dot(z, up, input_precision="tf32x3") + bias[None, :]
        value = log_sigmoid(gates) * factor
        if CLAMPED:
            value = tl.where(value < least, least, value)
        tl.store(OUT + start * channels + ts[:, None] * channels + cs[None, :], value, mask=inside[:, None] & there[None, :])


@triton.jit
def log_decay_gradients(
    Z, UP, BIAS, DOUT, DZ, SUMS, rows, channels, factor, least,
    RANK: tl.constexpr, CLAMPED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BACK: tl.constexpr, SUMMED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """What BC channels add to the gradient of z, DZ `[channels / BC, rows, RANK]` (BACK), and what this program's rows add to those
    of up and, behind them, bias, SUMS `[programs, RANK + 1, channels]` (SUMMED).

    Grid: (channels / BC, programs).
    """
    ts, cs, rs = tl.arange(0, ROWS), tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BR)
    there, ranked = cs < channels, rs < RANK
    up = tl.load(UP + cs[None, :] * RANK + rs[:, None], mask=ranked[:, None] & there[None, :], other=0.0).to(tl.float32)
    bias = tl.load(BIAS + cs, mask=there, other=0.0).to(tl.float32)
    up_high, up_low = halves(tl.trans(up))
    if BACK:
        DZ += tl.program_id(0).to(tl.int64) * rows * RANK
    dup = tl.zeros([BR, BC], tl.float32)
    dbias = tl.zeros([WARPS, BC], tl.float32)
    for start in range(tl.program_id(1).to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        inside = ts < rows - start
        places = start * RANK + ts[:, None] * RANK + rs[None, :]
        z = tl.load(Z + places, mask=inside[:, None] & ranked[None, :], other=0.0)
        dgates = tl.load(
            DOUT + start * channels + ts[:, None] * channels + cs[None, :], mask=inside[:, None] & there[None, :], other=0.0
        )
        gates = tl.dot(z, up, input_precision="tf32x3") + bias[None, :]
        if CLAMPED:
            dgates = tl.where(log_sigmoid(gates) * factor >= least, dgates, 0.0)
        dgates *= factor * tl.sigmoid(-gates)
        high, low = halves(dgates)
        if BACK:
            dz = dot_halves(high, low, up_high, up_low, tl.zeros([ROWS, BR], tl.float32))
            tl.store(DZ + places, dz, mask=inside[:, None] & ranked[None, :])
        if SUMMED:
            z_high, z_low = halves(tl.trans(z))
            dup = dot_halves(z_high, z_low, high, low, dup)
            # Rows that one thread holds: nothing is exchanged before the end.
            dbias += tl.sum(tl.reshape(dgates, [ROWS // WARPS, WARPS, BC]), 0)
    if SUMMED:
        SUMS += tl.program_id(1).to(tl.int64) * (RANK + 1) * channels
        tl.store(SUMS + rs[:, None] * channels + cs[None, :], dup, mask=ranked[:, None] & there[None, :])
        tl.store(SUMS + RANK * channels + cs, tl.sum(dbias, 0), mask=there)


@triton.jit
def add_in_pieces(X, OUT, count, width, parts, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Σ over X `[parts, count]`, cut in bfloat16 pieces, the larger first: OUT `[count / width, 3, width]`.

    EXACT: three that add up to the sum. Else two, and the first again. Grid: (count / BLOCK,).
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    rest = tl.zeros([BLOCK], tl.float32)
    X += places
    for _ in range(parts):
        rest += tl.load(X, mask=inside, other=0.0).to(tl.float32)
        X += count
    OUT += places // width * (3 * width) + places % width
    high = rest.to(tl.bfloat16)
    tl.store(OUT, high, mask=inside)
    rest -= high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    tl.store(OUT + width, middle, mask=inside)
    last = high
    if EXACT:
        last = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    tl.store(OUT + 2 * width, last, mask=inside)


@on_own_device
def low_rank_log_decay(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, *, normalizer: float, least: float | None) -> Tensor:
    """See `statex.kernels.pointwise.low_rank_log_decay`; for a rank up to MOST_RANK."""
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    decays: Tensor = _LowRankLogDecay.apply(rows, down, up.contiguous(), bias.contiguous(), 1 / normalizer, least)
    return decays.view(*x.shape[:-1], len(up))


class _LowRankLogDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, bias: Tensor, factor: float, least: float | None) -> Tensor:
        z = _through(x, down)
        ctx.save_for_backward(x, z, down, up, bias)
        ctx.bounds = factor, least
        out = torch.empty(len(x), len(up), dtype=torch.float32, device=x.device)
        if out.numel():
            grid, sizes, options = _launch(FORWARD, FORWARD_PROGRAMS, z, up, *ctx.bounds)
            log_decays[grid](z, up, bias, out, *sizes, **options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, down, up, bias = ctx.saved_tensors
        if not dy.numel():
            return *(torch.zeros_like(each) for each in (x, down, up, bias)), None, None
        of_x, of_down, *of_rest = ctx.needs_input_grad[:4]
        back, summed = of_x or of_down, any(of_rest)
        (tiles, programs), sizes, options = _launch(BACKWARD, BACKWARD_PROGRAMS, z, up, *ctx.bounds)
        parts = torch.empty(tiles, *z.shape, device=z.device) if back else None
        sums = torch.empty(programs, z.shape[1] + 1, len(up), device=z.device) if summed else None
        log_decay_gradients[tiles, programs](
            z, up, bias, dy.contiguous(), parts, sums, *sizes, BACK=back, SUMMED=summed, WARPS=BACKWARD.num_warps, **options
        )
        dx = ddown = dup = dbias = None
        if parts is not None:
            with torch.autocast(x.device.type, enabled=False):
                dx, ddown = _back(parts, x, down, of_x, of_down)
        if sums is not None:
            total = sums.sum(0)
            dup, dbias = total[:-1].t().to(up.dtype), total[-1].to(bias.dtype)
        return dx, ddown, dup, dbias, None, None


def _launch(
    tile: Launch, most: int, z: Tensor, up: Tensor, factor: float, least: float | None
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, int]]:
    """Grid, what follows the tensors, and Triton's options, for tiles of which at most `most` programs are made."""
    rows, rank = z.shape
    tiles = ceil_div(len(up), tile.columns)
    grid = (tiles, min(ceil_div(rows, tile.rows), max(1, most // tiles)))
    sizes = (rows, len(up), factor, 0.0 if least is None else float(least))
    block = max(16, power_of_2(rank))
    return grid, (*sizes, rank, least is not None, tile.rows, tile.columns, block), tile.options(tile.rows, tile.columns)


def _is_cut(x: Tensor) -> bool:
    """Whether x is multiplied as it is, with pieces of what it is multiplied with; else in float32."""
    return x.dtype == torch.bfloat16 and len(x) > FEW


def _through(x: Tensor, down: Tensor) -> Tensor:
    """x · downᵀ, `[rows, rank]` in float32."""
    if not _is_cut(x):
        return x.float() @ down.float().t()
    pieces = _cut(down[None], down.numel(), exact=True).view(-1, down.shape[1])
    return _product(x, pieces.t()).view(len(x), 3, -1).sum(1)


def _back(parts: Tensor, x: Tensor, down: Tensor, of_x: bool, of_down: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and down, where they are wanted; with bfloat16 rows that of z, and down, count to 2^-17."""
    dx = ddown = None
    if not _is_cut(x):
        dz = parts.sum(0)
        if of_x:
            dx = (dz @ down.float()).to(x.dtype)
        if of_down:
            ddown = dz.t() @ x.float()
    else:
        rank, hidden = down.shape
        dz = _cut(parts, rank, exact=False)  # high, middle and high again, which meets the middle of down
        if of_x:
            high, middle, _ = _cut(down[None], down.numel(), exact=False).view(3, rank, hidden)
            dx = dz @ torch.cat([high, high, middle])
        if of_down:
            ddown = _product(dz[:, : 2 * rank].t(), x).view(2, rank, hidden).sum(0)
    return dx, None if ddown is None else ddown.to(down.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b of bfloat16 numbers in float32."""
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _cut(parts: Tensor, width: int, *, exact: bool) -> Tensor:
    """The sum of `parts` `[parts, ...]` in bfloat16 pieces: `[count / width, 3 * width]`, see `add_in_pieces`."""
    count = parts[0].numel()
    pieces = torch.empty(count // width, 3 * width, dtype=torch.bfloat16, device=parts.device)
    add_in_pieces[(ceil_div(count, BLOCK),)](parts.contiguous(), pieces, count, width, len(parts), exact, BLOCK, num_warps=4)
    return pieces
