"""Keys and queries that carry more than their own channels: lifted (products of channels) and mixed (one query per value block).

SSD's rows are made here, segment by segment, in the dtype of the matrix products; GLA's are made where they are decayed, in
`gated.decay_rows`. Both are taken apart here in the backward pass, and never part of a training graph. x is one row of K channels,
psi_r(x)_c = x_c x_{c-r} / rms(x).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lift import FLOOR
from . import together
from .blocks import constant
from .layout import ceil_div, power_of_2

ELEMENTS = 2048
"""Numbers of x in a program, tokens times channels: with four warps, each has rows for itself and waits for no other. But at least
four tokens, since each program leaves sums for γ and M."""

_FLOOR = constant(FLOOR)


@triton.jit
def load_rows(X, ts, cs, x_t, inside):
    """Rows `[TOKENS, BC]` whose channel c holds x_{cs}, float32."""
    return tl.load(X + ts[:, None] * x_t + cs[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def back(cs, r, K):
    """(cs - r) mod K of channels in [0, K), without the remainder that a GPU takes 20 instructions for."""
    return tl.where(cs < r, cs - r + K, cs - r)


@triton.jit
def ahead(cs, r, K):
    """(cs + r) mod K of channels in [0, K)."""
    return tl.where(cs + r < K, cs + r, cs + r - K)


@triton.jit
def quarters(x):
    """Channels 4 i + j of rows `[TOKENS, BC]`, j = 0, 1, 2, 3, as `[TOKENS, BC / 4]` each: a thread holds all four."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def from_quarters(first, second, third, fourth):
    """Inverse of `quarters`."""
    joined = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(joined, [first.shape[0], first.shape[1] * 4])


@triton.jit
def moved_back(x, before, j: tl.constexpr):
    """Rows whose channel c is x_{c-j}, j < 4, from x and x moved by four channels: single channels are never loaded."""
    every = quarters(before) + quarters(x)
    return from_quarters(every[4 - j], every[5 - j], every[6 - j], every[7 - j])


@triton.jit
def moved_ahead(x, after, j: tl.constexpr):
    """Rows whose channel c is x_{c+j}, j < 4, likewise."""
    every = quarters(x) + quarters(after)
    return from_quarters(every[j], every[j + 1], every[j + 2], every[j + 3])


@triton.jit
def load_moved(X, ts, cs, by, x_t, K, there):
    """Rows moved back by `by` channels, a multiple of four, also three channels beyond K, where `moved_back` looks."""
    source = back(cs, by, K)
    inside = there[:, None] & ((source >= 0) & (cs < K + 4))[None, :]
    return tl.load(X + ts[:, None] * x_t + source[None, :], mask=inside, other=0.0)


@triton.jit
def make_rows(
    X, GAMMA, OUT, x_b, x_h, x_g, x_t, heads, tokens, K, channels,
    GROUP: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """OUT, part r = γ_r ∘ psi_r(x), with psi_0(x) = x and γ_0 = 1.

    Grid: (tokens / TOKENS, B * heads * GROUP); OUT is `[B, heads, GROUP, tokens, channels]`, zero beyond LIFT * K.
    """
    z = tl.program_id(1).to(tl.int64)
    g = z % GROUP
    h = (z // GROUP) % heads
    ts = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cs = tl.arange(0, BC)
    inside = (ts < tokens)[:, None] & (cs < K)[None, :]
    X += (z // GROUP // heads) * x_b + h * x_h + g * x_g
    x = load_rows(X, ts, cs, x_t, inside)
    root = tl.rsqrt(tl.sum(x * x, 1) / K + _FLOOR)[:, None]
    for r in tl.static_range(LIFT):
        row = x
        if r > 0:
            row = x * load_rows(X, ts, back(cs, r, K), x_t, inside) * root
            if GATED:
                row *= tl.load(GAMMA + ((h * GROUP + g) * (LIFT - 1) + r - 1) * K + cs, mask=cs < K, other=0.0)[None, :]
        places = (z * tokens + ts)[:, None] * channels + (r * K + cs)[None, :]
        tl.store(OUT + places, row.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def row_gradient(DOUT, MIXING, z, h, ts, cs, tokens, K, channels, r, inside, PARTS: tl.constexpr, MIXED: tl.constexpr):
    """Gradient of part r of the lifted row at channels cs, summed over the readers that mixing made of it."""
    total = tl.zeros(inside.shape, tl.float32)
    for j in tl.static_range(PARTS):
        places = ((z * PARTS + j) * tokens + ts)[:, None] * channels + (r * K + cs)[None, :]
        part = tl.load(DOUT + places, mask=inside, other=0.0).to(tl.float32)
        if MIXED:
            part *= tl.load(MIXING + (h * K + cs) * PARTS + j, mask=cs < K, other=0.0)[None, :]
        total += part
    return total


@triton.jit
def products_ahead(
    x, GAMMA, MIXING, DOUT, z, h, ts, cs, by, tokens, K, channels, r, there,
    PARTS: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """x, which comes moved ahead by `by` channels, times the gradient of part r there."""
    source = ahead(cs, by, K)
    inside = there[:, None] & (source < K)[None, :]
    product = x * row_gradient(DOUT, MIXING, z, h, ts, source, tokens, K, channels, r, inside, PARTS, MIXED)
    if GATED:
        product *= load_rows(GAMMA + (r - 1) * K, ts, source, 0, inside)
    return product


@triton.jit
def take_rows_apart(
    X, GAMMA, MIXING, DOUT, DX, DGAMMA, DMIXING, x_b, x_h, x_g, x_t, d_b, d_h, d_g, d_t, heads, tokens, K, channels,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
    TOKENS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of x from those of M_j ∘ γ_r ∘ psi_r(x), all parts r and readers j.

    DGAMMA and DMIXING are sums over the program's tokens, `[programs, ...]` with the program's row.

    Grid: (tokens / TOKENS, B * heads * GROUP).
    """
    z = tl.program_id(1).to(tl.int64)
    g = z % GROUP
    h = (z // GROUP) % heads
    ts = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cs = tl.arange(0, BC)
    valid = cs < K
    there = ts < tokens
    inside = there[:, None] & valid[None, :]
    X += (z // GROUP // heads) * x_b + h * x_h + g * x_g
    GAMMA += (h * GROUP + g) * (LIFT - 1) * K
    # Up to three channels beyond K are the first ones again, for `moved_ahead`.
    around = ahead(cs, 0, K)
    known = there[:, None] & (around < K)[None, :]
    x = load_rows(X, ts, around, x_t, known)
    root = tl.rsqrt(tl.sum(tl.where(valid[None, :], x * x, 0.0), 1) / K + _FLOOR)[:, None]
    dx = row_gradient(DOUT, MIXING, z, h, ts, cs, tokens, K, channels, 0, inside, PARTS, MIXED)
    through_root = tl.zeros([TOKENS], tl.float32)
    program = (z * tl.num_programs(0) + tl.program_id(0)) * K
    rolled = x
    before = x
    nearby = x
    further = x
    for r in tl.static_range(1, LIFT):
        if r % 4 == 0:
            rolled = before
            nearby = further
        if r % 4 == 0 or r == 1:
            before = load_moved(X, ts, cs, r // 4 * 4 + 4, x_t, K, there).to(tl.float32)
            source = ahead(cs, r // 4 * 4 + 4, K)
            further = load_rows(X, ts, source, x_t, there[:, None] & (source < K)[None, :])
        multiplied = moved_back(rolled, before, r % 4)
        dpart = row_gradient(DOUT, MIXING, z, h, ts, around, tokens, K, channels, r, known, PARTS, MIXED)
        if GATED:
            product = tl.sum(x * multiplied * dpart * root, 0)
            tl.store(DGAMMA + program * (LIFT - 1) + (r - 1) * K + cs, product, mask=valid)
            dpart *= load_rows(GAMMA + (r - 1) * K, ts, around, 0, known)
        # What x_c is multiplied by in channel c + r, from the products there and four channels on.
        here = x * dpart
        if r > 3:
            here = products_ahead(
                nearby, GAMMA, MIXING, DOUT, z, h, ts, cs, r // 4 * 4, tokens, K, channels, r, there, PARTS, GATED, MIXED
            )
        after = products_ahead(
            further, GAMMA, MIXING, DOUT, z, h, ts, cs, r // 4 * 4 + 4, tokens, K, channels, r, there, PARTS, GATED, MIXED
        )
        dx += root * (moved_ahead(here, after, r % 4) + dpart * multiplied)
        through_root += tl.sum(tl.where(valid[None, :], x * multiplied * dpart, 0.0), 1)
    dx -= x * root * root * root * (through_root / K)[:, None]
    if MIXED:
        for j in tl.static_range(PARTS):
            total = tl.zeros([BC], tl.float32)
            rolled = x
            before = x
            if LIFT > 1:
                before = load_moved(X, ts, cs, 4, x_t, K, there).to(tl.float32)
            for r in tl.static_range(LIFT):
                row = x
                if r > 0:
                    if r % 4 == 0:
                        rolled = before
                        before = load_moved(X, ts, cs, r + 4, x_t, K, there).to(tl.float32)
                    row = x * moved_back(rolled, before, r % 4) * root
                    if GATED:
                        row *= tl.load(GAMMA + (r - 1) * K + cs, mask=valid, other=0.0)[None, :]
                places = ((z * PARTS + j) * tokens + ts)[:, None] * channels + (r * K + cs)[None, :]
                total += tl.sum(row * tl.load(DOUT + places, mask=inside, other=0.0).to(tl.float32), 0)
            tl.store(DMIXING + program * PARTS + cs * PARTS + j, total, mask=valid)
    out = DX + (z // GROUP // heads) * d_b + h * d_h + g * d_g + ts[:, None] * d_t + cs[None, :]
    tl.store(out, dx.to(DX.dtype.element_ty), mask=inside)


def roots(x: Tensor) -> Tensor:
    """1 / rms(x), with FLOOR under the root: `[B, t, rows]`, float32, from `[B, t, rows, K]`."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return torch.rsqrt(norms.square() / x.shape[-1] + FLOOR).contiguous()


class Rows:
    """What rows are made of: x `[B, t, heads * group, K]` with γ `[heads * group, (lift-1) * K]` and M `[heads, K, parts]`, or
    None.

    Keys have a lift and neither γ nor M.
    """

    def __init__(self, heads: int, lift: int, channels: int, gamma: Tensor | None, mixing: Tensor | None) -> None:
        self.heads, self.lift, self.channels = heads, lift, channels
        self.gamma = None if gamma is None else gamma.detach().float().contiguous()
        self.mixing = None if mixing is None else mixing.detach().float().contiguous()
        self.parts = 1 if mixing is None else mixing.shape[-1]

    def _arguments(self, x: Tensor) -> tuple[tuple[int, ...], dict[str, object], tuple[int, int]]:
        batch, tokens, rows, key_dim = x.shape
        group = rows // self.heads
        strides = (x.stride(0), group * x.stride(2), x.stride(2), x.stride(1))
        width = max(4, power_of_2(key_dim))
        per_program = min(64, max(4, ELEMENTS // width))
        options: dict[str, object] = {
            "GROUP": group, "LIFT": self.lift, "GATED": self.gamma is not None, "TOKENS": per_program, "BC": width,
        }  # fmt: skip
        return strides, options, (ceil_div(tokens, per_program), batch * rows)

    def make(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `[B, heads, group, t, channels]`, not mixed."""
        batch, tokens, rows, key_dim = x.shape
        strides, options, grid = self._arguments(x)
        fill = torch.zeros if self.channels > self.lift * key_dim else torch.empty
        out = fill(batch, self.heads, rows // self.heads, tokens, self.channels, dtype=dtype, device=x.device)
        gamma = x if self.gamma is None else self.gamma
        together.launch(make_rows, grid)(x, gamma, out, *strides, self.heads, tokens, key_dim, self.channels, **options)
        return out

    def take_apart(self, x: Tensor, dout: Tensor, dx: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Writes the gradient of x into `dx` `[B, t, rows, K]`; returns those of γ and M, float32."""
        batch, tokens, rows, key_dim = x.shape
        strides, options, grid = self._arguments(x)
        group = rows // self.heads
        programs = grid[0]
        dgamma = dmixing = x
        if self.gamma is not None:
            dgamma = x.new_empty(batch, rows, programs, (self.lift - 1) * key_dim, dtype=torch.float32)
        if self.mixing is not None:
            dmixing = x.new_empty(batch, self.heads, group, programs, key_dim, self.parts, dtype=torch.float32)
        gamma, mixing = (x if extra is None else extra for extra in (self.gamma, self.mixing))
        together.launch(take_rows_apart, grid)(
            x, gamma, mixing, dout, dx, dgamma, dmixing, *strides, dx.stride(0), group * dx.stride(2), dx.stride(2), dx.stride(1),
            self.heads, tokens, key_dim, self.channels, PARTS=self.parts, MIXED=self.mixing is not None, **options,
        )  # fmt: skip
        return (
            None if self.gamma is None else dgamma.sum((0, 2)),
            None if self.mixing is None else dmixing.sum((0, 2, 3)),
        )
