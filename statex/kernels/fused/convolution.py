"""The short causal convolution with its activation: one pass over memory forward, one backward.

Same calls and results as the PyTorch forms in `statex.kernels.pointwise`. A program owns some channels of a stretch of tokens and
walks over them, a few at a time, all of which it loads at once; the last WIDTH - 1 it remembers, so that every row is loaded once.
Strides are constants: rows that are loaded together then share an address.
"""

# Kernels have no lists; their tuples grow, which mypy takes for another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import ceil_div, on_own_device, require_grid, unit_stride
from .pointwise import activated
from .scan_kernels import both

MOST_TAPS = 8
CHANNELS = 128
"""Of a program: one warp, so that it waits at no barrier."""
STEPS = 8
"""Tokens that are loaded at once."""
STRETCHES = (256, 16)
"""Longest and shortest stretch: every stretch reads WIDTH - 1 neighbours, and leaves sums for taps and bias."""
PROGRAMS = 4096
"""Programs that keep a device busy; stretches get shorter until there are so many."""


@triton.jit
def token_rows(ROWS, t, tokens, inside, T_STRIDE: tl.constexpr, STEPS: tl.constexpr):
    """STEPS tokens' rows in float32, from token t on, where ROWS points; 0 beyond the last."""
    rows = ()
    for j in tl.static_range(STEPS):
        rows += (tl.load(ROWS + j * T_STRIDE, mask=both(inside, t + j < tokens), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def since_rows(SINCE, t, tokens, PACKED: tl.constexpr, STEPS: tl.constexpr):
    """How many tokens of their sequence are in front of each of STEPS tokens."""
    rows = ()
    for j in tl.static_range(STEPS):
        since = 0
        if PACKED:
            since = tl.load(SINCE + t + j, mask=t + j < tokens, other=0).to(tl.int32)
        rows += (since,)
    return rows


@triton.jit
def taps_of(TAPS, BIAS, cs, inside, WIDTH: tl.constexpr, BIASED: tl.constexpr):
    """The taps by lag, and the bias."""
    taps = ()
    for lag in tl.static_range(WIDTH):
        taps += (tl.load(TAPS + cs * WIDTH + WIDTH - 1 - lag, mask=inside, other=0.0).to(tl.float32),)
    bias = tl.zeros(cs.shape, tl.float32)
    if BIASED:
        bias = tl.load(BIAS + cs, mask=inside, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def reached(row, since, lag: tl.constexpr, PACKED: tl.constexpr):
    """`row`, or 0 where a token looks over the start of its sequence with this lag."""
    if PACKED and lag > 0:
        row = tl.where(since >= lag, row, 0.0)
    return row


@triton.jit
def before_activation(xs, since, taps, bias, last: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """Σ over lags of x_{t-lag} · tap, and the bias; x_t is xs[last]."""
    mixed = bias
    for lag in tl.static_range(WIDTH):
        mixed += reached(xs[last - lag], since, lag, PACKED) * taps[lag]
    return mixed


@triton.jit
def part(length, channels: tl.constexpr, BC: tl.constexpr):
    """Where a program works: sequence, the first token of its stretch, channels. Neighbours lie side by side in memory."""
    blocks = tl.cdiv(channels, BC)
    cs = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    return tl.program_id(1).to(tl.int64), tl.program_id(0) // blocks * length, cs


@triton.jit(do_not_specialize=["tokens", "length"])
def convolve(
    X, TAPS, BIAS, SINCE, OUT, x_b, tokens, length, channels: tl.constexpr, X_T: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr, BIASED: tl.constexpr, STEPS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid: (channels / BC * stretches, B)."""
    EARLIER: tl.constexpr = WIDTH - 1
    z, first, cs = part(length, channels, BC)
    high = tl.minimum(tokens, first + length)
    inside = cs < channels
    X += z * x_b + first.to(tl.int64) * X_T + cs
    OUT += (z * tokens + first) * channels + cs
    taps, bias = taps_of(TAPS, BIAS, cs, inside, WIDTH, BIASED)
    xs = token_rows(X - EARLIER * X_T, 0, first, inside, X_T, EARLIER)  # 0 if first is 0
    for t in range(first, high, STEPS):
        xs += token_rows(X, t, high, inside, X_T, STEPS)
        sinces = since_rows(SINCE, t, high, PACKED, STEPS)
        for j in tl.static_range(STEPS):
            value, _ = activated(before_activation(xs, sinces[j], taps, bias, EARLIER + j, WIDTH, PACKED), ACTIVATION)
            tl.store(OUT + j * channels, value.to(OUT.dtype.element_ty), mask=both(inside, t + j < high))
        X += STEPS * X_T
        OUT += STEPS * channels
        xs = xs[STEPS:]


@triton.jit
def in_front(
    xs, dy, since, taps, bias, last: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The gradient in front of the activation, from that behind it."""
    _, slope = activated(before_activation(xs, since, taps, bias, last, WIDTH, PACKED), ACTIVATION)
    return dy * slope


@triton.jit(do_not_specialize=["tokens", "length"])
def convolve_gradients(
    X, TAPS, BIAS, SINCE, DOUT, DX, SUMS, x_b, tokens, length, channels: tl.constexpr, X_T: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr, BIASED: tl.constexpr, STEPS: tl.constexpr, BC: tl.constexpr, DX_T: tl.constexpr,
):  # fmt: skip
    """DX, and sums over a stretch's tokens: SUMS `[B, stretches, WIDTH + 1, channels]` holds gradients of the taps, then the bias.

    Gradients in front of the activation run WIDTH - 1 tokens ahead of those of x, and are never stored. What a pair of tokens gives
    to a tap counts where its x is. Grid: as above.
    """
    LATER: tl.constexpr = WIDTH - 1
    z, first, cs = part(length, channels, BC)
    high = tl.minimum(tokens, first + length)
    inside = cs < channels
    X += z * x_b + first.to(tl.int64) * X_T + cs
    DOUT += (z * tokens + first) * channels + cs
    DX += (z * tokens + first) * DX_T + cs
    taps, bias = taps_of(TAPS, BIAS, cs, inside, WIDTH, BIASED)
    xs = token_rows(X - LATER * X_T, 0, first, inside, X_T, LATER) + token_rows(X, first, tokens, inside, X_T, LATER)
    early = token_rows(DOUT, first, tokens, inside, channels, LATER)
    sinces = since_rows(SINCE, first, tokens, PACKED, LATER)
    grads = ()
    for j in tl.static_range(LATER):
        grads += (in_front(xs, early[j], sinces[j], taps, bias, LATER + j, WIDTH, ACTIVATION, PACKED),)
    xs = xs[LATER:]
    dbias = tl.zeros([BC], tl.float32)
    dtaps = ()
    for _ in tl.static_range(WIDTH):
        dtaps += (dbias,)
    for t in range(first, high, STEPS):
        xs += token_rows(X + LATER * X_T, t + LATER, tokens, inside, X_T, STEPS)
        dys = token_rows(DOUT + LATER * channels, t + LATER, tokens, inside, channels, STEPS)
        sinces += since_rows(SINCE, t + LATER, tokens, PACKED, STEPS)
        for j in tl.static_range(STEPS):
            grads += (in_front(xs, dys[j], sinces[LATER + j], taps, bias, LATER + j, WIDTH, ACTIVATION, PACKED),)
            dx = tl.zeros([BC], tl.float32)
            grown = ()
            for lag in tl.static_range(WIDTH):
                grad = reached(grads[j + lag], sinces[j + lag], lag, PACKED)
                dx += grad * taps[lag]
                grown += (dtaps[lag] + grad * xs[j],)
            dtaps = grown
            dbias += grads[j]
            tl.store(DX + j * DX_T, dx.to(DX.dtype.element_ty), mask=both(inside, t + j < high))
        X += STEPS * X_T
        DOUT += STEPS * channels
        DX += STEPS * DX_T
        xs = xs[STEPS:]
        sinces = sinces[STEPS:]
        grads = grads[STEPS:]
    SUMS += (z * tl.cdiv(tokens, length) + first // length) * (WIDTH + 1) * channels + cs
    for lag in tl.static_range(WIDTH):
        tl.store(SUMS + (WIDTH - 1 - lag) * channels, dtaps[lag], mask=inside)
    tl.store(SUMS + WIDTH * channels, dbias, mask=inside)


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
        convolve_token[(ceil_div(channels, CHANNELS), batch)](
            x, taps.contiguous(), bias, state, out, x.stride(0), *state.stride(), channels, width, activation, bias is not None,
            CHANNELS, num_warps=4,
        )  # fmt: skip
    return out


@on_own_device
def short_convolution(
    x: Tensor, taps: Tensor, bias: Tensor | None, since_start: Tensor | None, activation: str, sizes: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """See `statex.kernels.pointwise.short_convolution_parts`."""
    require_grid(x.shape[0])
    bias, since_start = (None if each is None else each.contiguous() for each in (bias, since_start))
    convolved: tuple[Tensor, ...] = _Convolution.apply(unit_stride(x), taps.contiguous(), bias, since_start, activation, sizes)
    return convolved


def stretch(batch: int, tokens: int, channels: int) -> int:
    """Tokens in a stretch."""
    length, shortest = STRETCHES
    while length > shortest and batch * ceil_div(tokens, length) * ceil_div(channels, CHANNELS) < PROGRAMS:
        length //= 2
    return length


class _Convolution(torch.autograd.Function):
    """A tensor for each of the parts that the channels make; the gradient of x is one, into which every part writes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, since_start: Tensor | None, activation: str, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, taps, bias, since_start)
        ctx.activation, ctx.sizes = activation, sizes
        outs = tuple(torch.empty(*x.shape[:2], size, dtype=x.dtype, device=x.device) for size in sizes)
        for out, part in zip(outs, _parts(sizes, x, taps, bias), strict=True):
            if out.numel():
                _walk(convolve, *part, since_start, out, activation=activation)
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias, since_start = ctx.saved_tensors
        batch, tokens, channels = x.shape
        dx, dtaps = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(taps)
        dbias = None if bias is None else torch.zeros_like(bias)
        places = _parts(ctx.sizes, dx, dtaps, dbias)
        for dy, part, (dx_part, dtaps_part, dbias_part) in zip(dys, _parts(ctx.sizes, x, taps, bias), places, strict=True):
            if dy.numel():
                stretches = ceil_div(tokens, stretch(*dy.shape))
                sums = torch.empty(batch, stretches, taps.shape[1] + 1, dy.shape[2], dtype=torch.float32, device=x.device)
                _walk(
                    convolve_gradients, *part, since_start, dy.contiguous(), dx_part, sums, activation=ctx.activation, DX_T=channels
                )
                total = sums.sum((0, 1))
                dtaps_part.copy_(total[:-1].t())
                if dbias_part is not None:
                    dbias_part.copy_(total[-1])
        return dx, dtaps, dbias, None, None, None


def _parts(sizes: tuple[int, ...], x: Tensor, taps: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Views of the parts' channels."""
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return zip(x.split(sizes, -1), taps.split(sizes), biases, strict=True)


def _walk(
    kernel: Any,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    since_start: Tensor | None,
    *tensors: Tensor,
    activation: str,
    **strides: int,
) -> None:
    (batch, tokens, channels), length = x.shape, stretch(*x.shape)
    kernel[ceil_div(channels, CHANNELS) * ceil_div(tokens, length), batch](
        x, taps, bias, since_start, *tensors, x.stride(0), tokens, length, channels, x.stride(1), taps.shape[1], activation,
        since_start is not None, bias is not None, STEPS, CHANNELS, num_warps=1, **strides,
    )  # fmt: skip
