"""The short causal convolution with its activation: one pass over memory forward, two backward.

Same calls and results as the PyTorch forms in `statex.kernels.pointwise`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import on_own_device, require_grid, unit_stride
from .pointwise import activated

MOST_TAPS = 8
ROWS, CHANNELS = 32, 128
"""Tile: neighbours read a few rows twice."""
PROGRAMS = 64
"""Programs that share the tokens of a backward pass and leave sums for taps and bias, each its own."""


@triton.jit
def before_activation(
    X, TAPS, BIAS, SINCE, x_t, ts, cs, tokens, channels, WIDTH: tl.constexpr, PACKED: tl.constexpr, BIASED: tl.constexpr
):  # fmt: skip
    """Σ over lags of x_{t-lag} · tap, and the bias: `[ROWS, BC]` for tokens ts and channels cs."""
    mixed = tl.zeros([ts.shape[0], cs.shape[0]], tl.float32)
    if BIASED:
        mixed += tl.load(BIAS + cs, mask=cs < channels, other=0.0).to(tl.float32)[None, :]
    for lag in tl.static_range(WIDTH):
        tap = tl.load(TAPS + cs * WIDTH + WIDTH - 1 - lag, mask=cs < channels, other=0.0).to(tl.float32)
        mixed += lagging(X, SINCE, x_t, ts, cs, tokens, channels, lag, PACKED) * tap[None, :]
    return mixed


@triton.jit
def lagging(X, SINCE, x_t, ts, cs, tokens, channels, lag, PACKED: tl.constexpr):
    """x_{t-lag}, 0 where that is before the start of t's sequence."""
    there = (ts >= lag) & (ts < tokens)
    if PACKED:
        there = there & (tl.load(SINCE + ts, mask=ts < tokens, other=0) >= lag)
    inside = there[:, None] & (cs < channels)[None, :]
    return tl.load(X + (ts - lag).to(tl.int64)[:, None] * x_t + cs[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    X, TAPS, BIAS, SINCE, OUT, x_b, x_t, tokens, channels,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, PACKED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens / ROWS, channels / BC, B)."""
    ts = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cs = tl.program_id(1) * BC + tl.arange(0, BC)
    z = tl.program_id(2).to(tl.int64)
    mixed = before_activation(X + z * x_b, TAPS, BIAS, SINCE, x_t, ts, cs, tokens, channels, WIDTH, PACKED, BIASED)
    value, _ = activated(mixed, ACTIVATION)
    places = (z * tokens + ts)[:, None] * channels + cs[None, :]
    tl.store(OUT + places, value.to(OUT.dtype.element_ty), mask=(ts < tokens)[:, None] & (cs < channels)[None, :])


@triton.jit
def convolve_gradients(
    X, TAPS, BIAS, SINCE, DOUT, DMIXED, DTAPS, x_b, x_t, tokens, channels,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, PACKED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """DMIXED, the gradient in front of the activation, and sums over this program's tokens: DTAPS `[B, programs, SUMS, channels]`
    holds by lag the gradient of its tap, then that of the bias.

    Grid: (programs, channels / BC, B).
    """
    cs = tl.program_id(1) * BC + tl.arange(0, BC)
    z = tl.program_id(2).to(tl.int64)
    X += z * x_b
    which = tl.arange(0, SUMS)
    sums = tl.zeros([SUMS, BC], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        ts = start + tl.arange(0, ROWS)
        places = (z * tokens + ts)[:, None] * channels + cs[None, :]
        inside = (ts < tokens)[:, None] & (cs < channels)[None, :]
        dmixed = tl.load(DOUT + places, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION != "identity":
            _, slope = activated(
                before_activation(X, TAPS, BIAS, SINCE, x_t, ts, cs, tokens, channels, WIDTH, PACKED, BIASED), ACTIVATION
            )
            dmixed *= slope
            tl.store(DMIXED + places, dmixed.to(DMIXED.dtype.element_ty), mask=inside)
        for lag in tl.static_range(WIDTH):
            dtap = tl.sum(dmixed * lagging(X, SINCE, x_t, ts, cs, tokens, channels, lag, PACKED), 0)
            sums += tl.where((which == lag)[:, None], dtap[None, :], 0.0)
        sums += tl.where((which == WIDTH)[:, None], tl.sum(dmixed, 0)[None, :], 0.0)
    rows = (z * tl.num_programs(0) + tl.program_id(0)) * SUMS + which
    tl.store(DTAPS + rows[:, None] * channels + cs[None, :], sums, mask=(cs < channels)[None, :])


@triton.jit
def convolve_back(
    DMIXED, TAPS, SINCE, DX, tokens, channels, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """DX_t = Σ over lags of DMIXED_{t+lag} · tap. Grid: (tokens / ROWS, channels / BC, B)."""
    ts = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cs = tl.program_id(1) * BC + tl.arange(0, BC)
    z = tl.program_id(2).to(tl.int64)
    dx = tl.zeros([ROWS, BC], tl.float32)
    for lag in tl.static_range(WIDTH):
        later = ts + lag
        there = later < tokens
        if PACKED:
            there = there & (tl.load(SINCE + later, mask=there, other=0) >= lag)
        inside = there[:, None] & (cs < channels)[None, :]
        places = (z * tokens + later)[:, None] * channels + cs[None, :]
        tap = tl.load(TAPS + cs * WIDTH + WIDTH - 1 - lag, mask=cs < channels, other=0.0).to(tl.float32)
        dx += tl.load(DMIXED + places, mask=inside, other=0.0).to(tl.float32) * tap[None, :]
    places = (z * tokens + ts)[:, None] * channels + cs[None, :]
    tl.store(DX + places, dx.to(DX.dtype.element_ty), mask=(ts < tokens)[:, None] & (cs < channels)[None, :])


@triton.jit
def convolve_token(
    X, TAPS, BIAS, STATE, OUT, x_b, s_b, s_c, s_t, channels,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BIASED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One token behind the WIDTH - 1 that STATE holds, which moves on by it. Grid: (channels / BC, B)."""
    cs = tl.program_id(0) * BC + tl.arange(0, BC)
    z = tl.program_id(1).to(tl.int64)
    there = cs < channels
    STATE += z * s_b
    x = tl.load(X + z * x_b + cs, mask=there, other=0.0)
    mixed = x.to(tl.float32) * tl.load(TAPS + cs * WIDTH + WIDTH - 1, mask=there, other=0.0).to(tl.float32)
    if BIASED:
        mixed += tl.load(BIAS + cs, mask=there, other=0.0).to(tl.float32)
    for place in tl.static_range(WIDTH - 1):  # the oldest first, so that each is read before the next takes its place
        past = tl.load(STATE + cs * s_c + place * s_t, mask=there, other=0.0)
        mixed += past.to(tl.float32) * tl.load(TAPS + cs * WIDTH + place, mask=there, other=0.0).to(tl.float32)
        if place > 0:
            tl.store(STATE + cs * s_c + (place - 1) * s_t, past, mask=there)
    if WIDTH > 1:
        tl.store(STATE + cs * s_c + (WIDTH - 2) * s_t, x, mask=there)
    value, _ = activated(mixed, ACTIVATION)
    tl.store(OUT + z * channels + cs, value.to(OUT.dtype.element_ty), mask=there)


@torch.no_grad()
@on_own_device
def short_convolution_step(x: Tensor, state: Tensor, taps: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See `statex.kernels.pointwise.short_convolution_step`."""
    (batch, channels), width = x.shape, taps.shape[1]
    require_grid(batch)
    x, bias = unit_stride(x), None if bias is None else bias.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        convolve_token[(triton.cdiv(channels, CHANNELS), batch)](
            x, taps.contiguous(), bias, state, out, x.stride(0), *state.stride(), channels, width, activation, bias is not None,
            CHANNELS, num_warps=4,
        )  # fmt: skip
    return out


@on_own_device
def short_convolution(x: Tensor, taps: Tensor, bias: Tensor | None, since_start: Tensor | None, activation: str) -> Tensor:
    """See `statex.kernels.pointwise.short_convolution`."""
    require_grid(x.shape[0])
    bias, since_start = (None if each is None else each.contiguous() for each in (bias, since_start))
    convolved: Tensor = _Convolution.apply(unit_stride(x), taps.contiguous(), bias, since_start, activation)
    return convolved


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, since_start: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(x, taps, bias, since_start)
        ctx.activation = activation
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            convolve[_grid(x)](
                x, taps, bias, since_start, out, *_sizes(x), taps.shape[1], activation, since_start is not None, bias is not None,
                ROWS, CHANNELS, num_warps=4,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias, since_start = ctx.saved_tensors
        dy, width, packed = dy.contiguous(), taps.shape[1], since_start is not None
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not x.numel():
            return dx, torch.zeros_like(taps), None if bias is None else torch.zeros_like(bias), None, None
        tiles, columns, batch = _grid(x)
        programs, sums = min(tiles, PROGRAMS), triton.next_power_of_2(width + 1)
        dmixed = dy if ctx.activation == "identity" else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = torch.empty(batch, programs, sums, x.shape[2], dtype=torch.float32, device=x.device)
        tile = {"ROWS": ROWS, "BC": CHANNELS, "num_warps": 4}
        convolve_gradients[programs, columns, batch](
            x, taps, bias, since_start, dy, dmixed, parts, *_sizes(x), width, ctx.activation, packed, bias is not None,
            SUMS=sums, **tile,
        )  # fmt: skip
        convolve_back[tiles, columns, batch](dmixed, taps, since_start, dx, *x.shape[1:], width, packed, **tile)
        total = parts.sum((0, 1))
        dtaps = total[:width].flip(0).t().to(taps.dtype)
        return dx, dtaps, None if bias is None else total[width].to(bias.dtype), None, None


def _grid(x: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[1], ROWS), triton.cdiv(x.shape[2], CHANNELS), x.shape[0]


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.stride(0), x.stride(1), x.shape[1], x.shape[2]
