"""Mamba's selective scan on a GPU: what `statex.kernels.selective_scan` computes, forward and backward.

Time is cut into stretches. First each stretch is walked from zero, all at once; then the states in front of them are joined; then
all stretches are walked from these. Backward it goes the same way in reverse, and a stretch makes its states again. Kept between
the passes are the inputs and one float32 state a stretch. What a token makes of the state stays in registers, but for one state in
every STEPS tokens in the backward pass, in scratch that is bounded: stretches are taken some at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import e, log2
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import layout, scan_kernels
from .layout import ceil_div, on_own_device, pad_to, padded, require_grid, unit_stride

LANES = 32
"""Lanes of a warp, which is a program."""

HELD = 16
"""Numbers of the state that a lane holds, of all its channels together."""

IN_LANE = 4
"""Numbers of each of its channels: with as many channels both kinds of sums need few shuffles, and vectors are whole."""

WIDEST = 32
"""Numbers of a channel's state in a tile; longer states are shared out to several programs, whose outputs are added."""

LENGTHS = (32, 256)
"""Tokens in the shortest and the longest stretch. Short ones make more programs, and keep more states."""

PROGRAMS = 2048
"""Programs that keep a large GPU busy; with fewer, stretches are made shorter."""

STEPS = {"walk": 4, "read": 4, "gradients": 4}
"""Tokens whose rows are loaded at once."""

JOIN = 256
"""Numbers of a state that a program of `join_stretches` carries."""


@torch.compiler.disable
@on_own_device
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    spectrum: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `statex.kernels.selective_scan`, but A `[N, I]` and B, C come lifted, and states are `[B, N, I]`;
    packed sequences start from zero states, and the state returned is that of the last."""
    batch, tokens, channels = x.shape
    d_state = B.shape[-1]
    shape = _shape(batch, tokens, channels, d_state)
    numbers = shape.numbers
    require_grid(batch * shape.stretches)
    keys, queries = (padded(padded(row.float(), 2, numbers), 1, shape.padded_tokens).contiguous() for row in (B, C))
    rates = padded(A.float(), 0, numbers).contiguous()
    if initial_state is None:
        state = torch.zeros(batch, numbers, channels, dtype=torch.float32, device=x.device)
    else:
        state = padded(initial_state.float(), 1, numbers).contiguous()
    skip, reach = (None if each is None else each.float().contiguous() for each in (D, spectrum))
    keep = None if cu_seqlens is None else _keep(cu_seqlens, tokens, x.device)
    y, final = _Scan.apply(unit_stride(x), unit_stride(dt), rates, keys, queries, skip, reach, state, keep, shape)
    return y, final[:, :d_state]


def _keep(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Tensor:
    """0 for the first token of every packed sequence but the first, else 1, `[T]`."""
    keep = torch.ones(tokens + 1, dtype=torch.float32, device=device)  # borders at T belong to empty sequences at the end
    return keep.index_fill_(0, cu_seqlens.to(device, torch.int64), 0.0)[:tokens]


def _shape(batch: int, tokens: int, channels: int, d_state: int) -> _Shape:
    """Stretches as long as leaves enough programs, and not so many that no grid holds them."""
    tile_numbers = min(1 << max(d_state - 1, IN_LANE - 1).bit_length(), WIDEST)
    numbers = pad_to(d_state, tile_numbers)
    state = channels * numbers // (LANES * HELD)
    length = LENGTHS[1]
    while length > LENGTHS[0] and batch * state * (tokens // length) < PROGRAMS:
        length //= 2
    while batch * ceil_div(tokens, length) > layout.PROGRAMS and length < tokens:
        length *= 2
    length = min(length, pad_to(tokens, max(STEPS.values())))
    return _Shape(batch, tokens, pad_to(tokens, length), channels, numbers, length, tile_numbers)


@dataclass(frozen=True)
class _Shape:
    batch: int
    tokens: int
    padded_tokens: int
    channels: int
    numbers: int
    """Of a channel's state, padded to whole tiles."""
    length: int
    """Tokens in a stretch."""
    tile_numbers: int

    @property
    def stretches(self) -> int:
        return self.padded_tokens // self.length

    @property
    def tile(self) -> dict[str, int]:
        """Numbers and channels of a lane, and lanes along both; a lane holds as many of the one as of the other."""
        lanes = self.tile_numbers // IN_LANE
        return {"NL": lanes, "DL": LANES // lanes, "NR": IN_LANE, "DR": HELD // IN_LANE, "num_warps": 1}

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of channels, blocks of numbers."""
        return ceil_div(self.channels * self.tile_numbers, LANES * HELD), self.numbers // self.tile_numbers

    def batches(self, bytes_per_token: int) -> Iterator[tuple[int, int]]:
        """Runs of stretches whose scratch fits."""
        most = max(1, layout.SEGMENT_BYTES // (self.batch * self.length * bytes_per_token))
        count = ceil_div(self.stretches, most)
        length = ceil_div(self.stretches, count)
        for start in range(0, self.stretches, length):
            yield start, min(start + length, self.stretches)


class _Pass:
    """One call's inputs, as the kernels take them."""

    def __init__(
        self, shape: _Shape, x: Tensor, dt: Tensor, rates: Tensor, skip: Tensor | None, reach: Tensor | None, keep: Tensor | None
    ):
        self.shape, self.x, self.dt = shape, x, dt
        self.rates = rates * log2(e)
        self.skip, self.reach, self.keep = (x if each is None else each for each in (skip, reach, keep))
        self.forms: dict[str, Any] = {"SIGNED": reach is not None, "PACKED": keep is not None, **shape.tile}
        self.has_skip = skip is not None

    def starts(self, x: Tensor, keys: Tensor, state: Tensor, *, backward: bool) -> Tensor:
        """States in front of every stretch, `[B, stretches, N, I]`; backward the gradients behind each, of output gradients `x`."""
        s = self.shape
        if s.stretches == 1:
            return state[:, None]
        ends, totals = (state.new_empty(s.batch, s.stretches, s.numbers, s.channels) for _ in range(2))
        scan_kernels.walk_stretch[(*s.blocks, s.batch * s.stretches)](
            x, self.dt, self.rates, keys, self.keep, self.reach, ends, totals, *x.stride()[:2], *self.dt.stride()[:2],
            s.tokens, s.padded_tokens, s.channels, s.numbers, s.length, BACKWARD=backward, STEPS=STEPS["walk"], **self.forms,
        )  # fmt: skip
        size = s.numbers * s.channels
        scan_kernels.join_stretches[(ceil_div(size, JOIN), s.batch)](
            ends, totals, state, size, s.stretches, BACKWARD=backward, STEPS=4, BLOCK=JOIN, num_warps=4
        )
        return ends

    def shares(self, start: int, end: int, *outs: Tensor) -> list[Tensor]:
        """Where programs write rows of some stretches, `[number blocks, B, t, I]`: into `outs` themselves if there is but one."""
        s = self.shape
        if s.blocks[1] == 1:
            return [out[None, :, start * s.length :] for out in outs]
        sizes = (s.blocks[1], s.batch, (end - start) * s.length, s.channels)
        return [torch.empty(sizes, dtype=torch.float32, device=out.device) for out in outs]

    def gather(self, start: int, end: int, shares: list[Tensor], *outs: Tensor) -> None:
        """Adds the shares up, where there are several."""
        s = self.shape
        if s.blocks[1] > 1:
            for share, out in zip(shares, outs, strict=True):
                there = out[:, start * s.length : end * s.length]
                there.copy_(share[:, :, : there.shape[1]].sum(0))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, rates, keys, queries, skip, reach, state, keep, shape):
        """Rows `[B, T, ...]`, keys and queries padded; the state `[B, N, I]`."""
        run = _Pass(shape, x, dt, rates, skip, reach, keep)
        starts = run.starts(x, keys, state, backward=False)
        y, final = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
        several = shape.blocks[1] if shape.blocks[1] > 1 else 0
        for start, end in shape.batches(4 * several * shape.channels or 1):
            shares = run.shares(start, end, y)
            scan_kernels.read_stretch[(*shape.blocks, shape.batch * (end - start))](
                x, dt, run.rates, keys, queries, run.skip, run.keep, run.reach, starts, shares[0], final,
                *x.stride()[:2], *dt.stride()[:2], *shares[0].stride()[:3], shape.tokens, shape.padded_tokens, shape.channels,
                shape.numbers, shape.length, end - start, start, HAS_SKIP=run.has_skip, STEPS=STEPS["read"], **run.forms,
            )  # fmt: skip
            run.gather(start, end, shares, y)
        ctx.save_for_backward(x, dt, rates, keys, queries, skip, reach, keep, starts)
        ctx.shape = shape
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        """Batches of stretches, each by itself: the gradients behind them all are made first."""
        x, dt, rates, keys, queries, skip, reach, keep, starts = ctx.saved_tensors
        shape: _Shape = ctx.shape
        run = _Pass(shape, x, dt, rates, skip, reach, keep)
        dy, dfinal = unit_stride(dy), dfinal.contiguous()
        ends = run.starts(dy, queries, dfinal, backward=True)
        dx, ddt = (torch.empty(row.shape, dtype=row.dtype, device=row.device) for row in (x, dt))
        dkeys, dqueries, dstart, drates = (torch.empty_like(each) for each in (keys, queries, dfinal, starts))
        by_stretch = (shape.batch, shape.stretches, shape.channels)
        dskip, dreach = (rates.new_empty(count, *by_stretch) for count in (1, shape.blocks[1]))
        channel_blocks, number_blocks = shape.blocks
        tiles = channel_blocks * LANES * HELD * number_blocks
        per_token = 4 * (tiles // STEPS["gradients"] + 2 * channel_blocks * shape.numbers)
        per_token += 8 * number_blocks * shape.channels if number_blocks > 1 else 0
        for start, end in shape.batches(per_token):
            count = shape.batch * (end - start)
            states = rates.new_empty(count * (shape.length // STEPS["gradients"]) * tiles)
            key_shares, query_shares = (
                rates.new_empty(channel_blocks, shape.batch, (end - start) * shape.length, shape.numbers) for _ in range(2)
            )
            shares = run.shares(start, end, dx, ddt)
            scan_kernels.stretch_gradients[(*shape.blocks, count)](
                x, dt, run.rates, keys, queries, run.skip, run.keep, run.reach, starts, dy, ends, states,
                *shares, drates, key_shares, query_shares, dskip, dreach, dstart,
                *x.stride()[:2], *dt.stride()[:2], *dy.stride()[:2], *shares[0].stride()[:3],
                shape.tokens, shape.padded_tokens, shape.channels, shape.numbers, shape.length, end - start, start,
                HAS_SKIP=run.has_skip, STEPS=STEPS["gradients"], **run.forms,
            )  # fmt: skip
            run.gather(start, end, shares, dx, ddt)
            there = slice(start * shape.length, end * shape.length)
            torch.sum(key_shares, 0, out=dkeys[:, there])
            torch.sum(query_shares, 0, out=dqueries[:, there])
        dskip = None if skip is None else dskip.sum((0, 1, 2))
        dreach = None if reach is None else dreach.sum((0, 1, 2))
        return dx, ddt, drates.sum((0, 1)), dkeys, dqueries, dskip, dreach, dstart, None, None
