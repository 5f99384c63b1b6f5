"""Mamba-2's state space model on a GPU: what `statex.kernels.ssd` computes, forward and backward, segment by segment.

B and C, the keys and queries, are shared by the heads of a group, whose values lie side by side: one product serves them all, and
what differs between heads (decays, steps) goes on values, outputs and scores. Sums of decays inside a chunk are made in float64
and split into two float32 numbers, so that their differences are exact to rounding however strong the decay. Scratch as in `gla`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lift import lift_factor
from . import blocks, by_head, together
from .layout import (
    BLOCK,
    Operands,
    ceil_div,
    chunk_length,
    forget_at_borders,
    launch_of,
    needs_gradient,
    on_own_device,
    operands,
    pad_to,
    padded,
    power_of_2,
    require_grid,
    segments,
    state_tiles,
    tile,
    unit_stride,
)
from .rows import Rows


@torch.compiler.disable
@on_own_device
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    lift_gamma: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results of `statex.kernels.ssd`, but packed sequences start from zero states and return none.

    `log_decay` `[B, T, H]`, at most 0, takes the place of dt · A.
    """
    batch, tokens, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    out_dtype, how = x.dtype, operands(x, B, C)
    if how.dtype != torch.bfloat16:
        x, B, C = x.float(), B.float(), C.float()
    state_dim = d_state * lift_factor(lift_gamma, d_state)
    channels = pad_to(state_dim, BLOCK)
    width = 32 if head_dim <= 32 else pad_to(head_dim, BLOCK)
    shape = _Shape(
        batch=batch,
        groups=groups,
        heads=heads // groups,
        head_dim=width,
        state_dim=state_dim,
        channels=channels,
        chunk=chunk_length(tokens, channels, heads // groups * width, how.dtype == torch.float32),
        how=how,
        straight=lift_gamma is None and channels == d_state,
        differentiable=needs_gradient(x, dt, A, B, C, D, lift_gamma, log_decay, initial_state),
    )
    require_grid(batch * groups)
    whole = pad_to(tokens, shape.chunk)
    dt = dt.float()
    if log_decay is None:
        log_decay = dt * A.float()
    log_decay = forget_at_borders(log_decay.float(), cu_seqlens)
    x = padded(x, 3, width)
    x, B, C = (padded(_rows_side_by_side(u), 1, whole) for u in (x, B, C))
    dt, log_decay = (unit_stride(padded(u, 1, whole)) for u in (dt, log_decay))
    if initial_state is None:
        state = torch.zeros(batch, groups, channels, shape.values, dtype=torch.float32, device=x.device)
    else:
        state = padded(padded(initial_state.float(), 3, width), 2, channels)
        state = state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3).contiguous()
    end = shape.segments(whole)[0][1]
    first = (*(u[:, :end] for u in (x, dt, log_decay, B, C)), D, lift_gamma, state, shape)
    kind = (dataclasses.replace(shape, batch=1), x.dtype, D is None, lift_gamma is None)
    together.compile_pass(kind, _SSD, first, backward=shape.differentiable)
    y, state = _SSD.apply(x, dt, log_decay, B, C, D, lift_gamma, state, shape)
    y = y[:, :tokens, :, :head_dim].to(out_dtype)
    if not output_final_state:
        return y, None
    state = state.unflatten(3, (shape.heads, width)).transpose(2, 3).flatten(1, 2)
    return y, state[:, :, :state_dim, :head_dim]


def _rows_side_by_side(x: Tensor) -> Tensor:
    """`[B, T, H, D]` with a token's heads next to one another, copied where they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call; `heads` to a group."""

    batch: int
    groups: int
    heads: int
    head_dim: int
    """Channels of a value, padded."""
    state_dim: int
    channels: int
    """`state_dim` padded to whole blocks."""
    chunk: int
    how: Operands
    straight: bool
    """B and C are used as they come."""
    differentiable: bool
    """A backward pass may follow."""

    @property
    def values(self) -> int:
        """Values of all heads of a group."""
        return self.heads * self.head_dim

    def segments(self, tokens: int) -> list[tuple[int, int]]:
        size = self.how.dtype.itemsize
        states = size * self.channels * self.values // self.chunk
        rows = self.channels * (2 * size + 8) + 2 * size * self.chunk
        steps = 4 * self.heads * (12 + 2 * self.chunk // BLOCK)
        return segments(tokens, self.chunk, self.batch * self.groups * (rows + states + steps))


class _Segment:
    """Scratch of one run of chunks: what both passes make from its inputs."""

    def __init__(
        self, shape: _Shape, rows: Iterable[Tensor], D: Tensor | None, gamma: Tensor | None, scores: Tensor | None = None
    ) -> None:
        x, dt, g, B, C = rows
        self.shape, self.x, self.B, self.C, self.g = shape, x, B, C, g
        self.D = None if D is None else D.detach().float().contiguous()
        self.tokens = x.shape[1]
        self.chunks = self.tokens // shape.chunk
        s = shape
        lift = 1 if gamma is None else lift_factor(gamma, B.shape[-1])
        self.query_rows, self.key_rows = Rows(s.groups, lift, s.channels, gamma, None), Rows(s.groups, lift, s.channels, None, None)
        if s.straight:
            self.queries, self.keys = (u.unsqueeze(3).movedim(1, 3) for u in (C, B))
        else:
            self.queries, self.keys = self.query_rows.make(C, s.how.dtype), self.key_rows.make(B, s.how.dtype)
        self.step_strides = (s.groups * s.heads * self.tokens, s.heads * self.tokens, self.tokens)
        self._sums(dt)
        self.scores = self._scores() if scores is None else scores

    def scratch(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised `[B, groups, *sizes]`."""
        s = self.shape
        return torch.empty(s.batch, s.groups, *sizes, dtype=dtype or s.how.dtype, device=self.x.device)

    def per_step(self, *sizes: int) -> Tensor:
        """Uninitialised `[*sizes, B, H, t]`, float32."""
        s = self.shape
        return torch.empty(*sizes, s.batch, s.groups * s.heads, self.tokens, dtype=torch.float32, device=self.x.device)

    def column_strides(self, x: Tensor) -> tuple[int, int, int]:
        """Batch, group and time strides of values `[B, t, H, P]`."""
        return x.stride(0), self.shape.values, x.stride(1)

    @property
    def pairs(self) -> int:
        return (self.shape.chunk // BLOCK) ** 2

    def _sums(self, dt: Tensor) -> None:
        """Sums of decays and what follows from them and from steps `[B, t, H]`; see the kernel."""
        s, g, heads = self.shape, self.g, self.shape.groups * self.shape.heads
        self.hi, self.lo, self.reading, self.to_end, self.writing, self.dt = self.per_step(6)
        self.chunk_decay = self.scratch(self.chunks, s.heads, dtype=torch.float32)
        width = min(by_head.HEADS, power_of_2(heads))
        together.launch(by_head.step_sums, (ceil_div(heads, width), self.chunks, s.batch))(
            g, dt, self.hi, self.lo, self.reading, self.to_end, self.writing, self.dt, self.chunk_decay,
            g.stride(0), g.stride(1), dt.stride(0), dt.stride(1), self.chunks, heads, s.heads, CHUNK=s.chunk, BH=width, num_warps=8,
        )  # fmt: skip

    def _scores(self) -> Tensor:
        """C_i · B_j without decays, `[B, groups, 1, t, chunk]`, written for blocks on and below the diagonal."""
        s, q, k = self.shape, self.queries, self.keys
        out = self.scratch(1, self.tokens, s.chunk)
        together.launch(blocks.score_pairs, (self.pairs, self.chunks, s.batch * s.groups))(
            q, k, out, q.stride(0), q.stride(1), 0, q.stride(3), k.stride(0), k.stride(1), k.stride(3),
            s.groups, self.tokens, s.channels,
            GROUP=1, PARTS=1, CHUNK=s.chunk, PRECISION=s.how.precision, BK=BLOCK, **launch_of("pairs", s.how).options(BLOCK, BLOCK),
        )  # fmt: skip
        return out

    def carry(
        self, rows: Tensor, values: Tensor, weights: Tensor, start: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States in front of every chunk and after the last; the last in float32; and energies. See `gla`; with `states`,
        backward in time."""
        s, backward = self.shape, states is not None
        launch = launch_of("carry by head", s.how)
        bk, bv = state_tiles(launch, s.channels, s.values, s.batch * s.groups, s.head_dim)
        carried, end = self.scratch(self.chunks + 1, s.channels, s.values), torch.empty_like(start)
        grid = (s.values // bv, s.channels // bk, s.batch * s.groups)
        energy = end
        if backward:
            energy = torch.empty(grid[1], s.batch * s.groups, self.chunks, s.values, dtype=torch.float32, device=end.device)
        x_strides = (rows.stride(0), rows.stride(1), 0, 0, rows.stride(3))
        y_b, y_h, y_t = self.column_strides(values)
        together.launch(blocks.carry_states, grid)(
            rows, values, weights, self.chunk_decay, start, carried, end, carried if states is None else states, energy,
            *x_strides, y_b, y_h, 0, y_t, *self.step_strides, s.groups, self.chunks, s.channels, s.values, s.values, s.head_dim,
            GROUP=1, CHUNK=s.chunk, BY_ROW=False, BACKWARD=backward, PRECISION=s.how.precision, BK=bk, BV=bv,
            **launch.options(bk, bv),
        )  # fmt: skip
        return carried, end, energy

    def read(
        self, rows: Tensor, states: Tensor, y: Tensor, scale: Tensor, *, transposed: bool, out: Tensor | None = None,
        partner: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Outputs (transposed: gradients of values) into `out`. With `partner`, returns Σ over a head's channels of
        partner · (rows S_c), `[B, H, t]`."""
        s = self.shape
        launch = launch_of("read by head", s.how)
        bm, bn = min(s.chunk, launch.rows), tile(s.head_dim, launch.columns, 128, 64, 32)
        sums = y if partner is None else self.per_step(max(s.head_dim // bn, 1))
        partner_strides = (0, 0, 0) if partner is None else self.column_strides(partner)
        y_b, y_h, y_t = self.column_strides(y)
        o_b, o_h, o_t = (0, 0, 0) if out is None else self.column_strides(out)
        together.launch(blocks.read_states, (s.values // bn, self.tokens // bm, s.batch * s.groups))(
            rows, states, self.scores, y, y if out is None else out, scale, self.hi, self.lo, self.dt,
            self.dt if self.D is None else self.D, y if partner is None else partner, sums,
            rows.stride(0), rows.stride(1), 0, 0, rows.stride(3), y_b, y_h, 0, y_t, o_b, o_h, 0, o_t, *partner_strides,
            *self.step_strides, s.groups, self.tokens, self.chunks, s.channels, s.values, s.values, s.head_dim,
            GROUP=1, PARTS=1, CHUNK=s.chunk, TRANSPOSED=transposed, SCALAR=True, HAS_SKIP=self.D is not None,
            SUMMED=partner is not None, WRITTEN=out is not None, PRECISION=s.how.precision, BM=bm, BN=bn,
            BK=BLOCK, **launch.options(bm, bn),
        )  # fmt: skip
        return sums.sum(0) if partner is not None and len(sums) > 1 else sums[0]

    def project(
        self, x: Tensor, weights: Tensor, states: Tensor, dscores: Tensor, rows: Tensor, out: Tensor, *, transposed: bool
    ) -> None:
        """(x · weights) S_cᵀ + (dscores causal) rows into `out` `[B, groups, t, K]`."""
        s = self.shape
        launch = launch_of("project", s.how)
        bm, bn = min(s.chunk, launch.rows), tile(s.channels, launch.columns, 128, 64)
        x_b, x_h, x_t = self.column_strides(x)
        together.launch(blocks.project, (s.channels // bn, self.tokens // bm, s.batch * s.groups))(
            x, states, dscores, rows, weights, out, x_b, x_h, 0, x_t, rows.stride(0), rows.stride(1), rows.stride(3),
            out.stride(0), out.stride(1), 0, out.stride(2), *self.step_strides,
            s.groups, self.tokens, self.chunks, s.channels, s.values, s.values, s.head_dim,
            GROUP=1, PARTS=1, CHUNK=s.chunk, WEIGHTED=True, TRIANGLE=True, TRANSPOSED=transposed,
            PRECISION=s.how.precision, BM=bm, BN=bn, BK=min(s.head_dim, BLOCK), **launch.options(bm, bn),
        )  # fmt: skip

    def destination(self, grad: Tensor) -> Tensor:
        """Where gradients of rows go, `[B, groups, t, K]`: to `grad` `[B, t, groups, K]`, or to float32 that is taken apart."""
        s = self.shape
        return grad.transpose(1, 2) if s.straight else self.scratch(self.tokens, s.channels, dtype=torch.float32)

    def pair_gradients(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of scores, and per step and head `rows`, `columns` (both by slot), `own`, `inside` and `skip`: see the kernel,
        which leaves places of them unwritten that `step_gradients` does not read."""
        s = self.shape
        dscores, slots = torch.empty_like(self.scores), s.chunk // BLOCK
        rows, columns = self.per_step(slots), self.per_step(slots)
        own, inside, skip = self.per_step(), self.per_step(), self.per_step()
        programs = {"block gradients": slots} | ({"pair gradients": self.pairs} if slots > 1 else {})
        for name, count in programs.items():
            together.launch(by_head.pair_gradients, (count, self.chunks, s.batch * s.groups))(
                self.x, dy, self.scores, self.hi, self.lo, self.dt, dscores, rows, columns, own, inside, skip,
                *self.column_strides(self.x), *self.column_strides(dy), *self.step_strides,
                s.groups, self.tokens, s.heads, own.numel(),
                HEAD_DIM=s.head_dim, CHUNK=s.chunk, DIAGONAL=name == "block gradients", PRECISION=s.how.precision,
                BP=min(s.head_dim, BLOCK), **launch_of(name, s.how).options(BLOCK, BLOCK),
            )  # fmt: skip
        return dscores, rows, columns, own, inside, skip

    def step_gradients(self, energy: Tensor, ddt: Tensor, dg: Tensor, *parts: Tensor) -> None:
        """Writes gradients of steps and log-decays `[B, t, H]` from `energy`, which `carry` makes, and from `parts`: what `read`
        makes of both passes, and what `pair_gradients` makes."""
        s, heads = self.shape, self.shape.groups * self.shape.heads
        crossing = energy.unflatten(-1, (s.heads, s.head_dim)).sum((0, -1))
        width = min(by_head.HEADS, power_of_2(heads))
        together.launch(by_head.step_gradients, (ceil_div(heads, width), self.tokens // BLOCK, s.batch))(
            self.g, self.dt, *parts, crossing, ddt, dg, self.g.stride(0), self.g.stride(1), ddt.stride(0), ddt.stride(1),
            self.chunks, heads, s.heads, self.dt.numel(), CHUNK=s.chunk, BH=width,
        )  # fmt: skip


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, log_decay, B, C, D, gamma, state, shape):
        """Rows `[B, T, ...]` of whole chunks and padded values; the state `[B, groups, K, heads * P]`, float32."""
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        kept: list[Tensor] = []
        for start, end in shape.segments(x.shape[1]):
            segment = _Segment(shape, (u[:, start:end] for u in (x, dt, log_decay, B, C)), D, gamma)
            states, state, _ = segment.carry(segment.keys, segment.x, segment.writing, state)
            segment.read(segment.queries, states, segment.x, segment.reading, transposed=False, out=y[:, start:end])
            if shape.differentiable:
                kept += [states, segment.scores]
        ctx.save_for_backward(x, dt, log_decay, B, C, D, gamma, *kept)
        ctx.shape = shape
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        """Segments from the last to the first, each made again from the state in front of it."""
        x, dt, log_decay, B, C, D, gamma, *kept = ctx.saved_tensors
        shape: _Shape = ctx.shape
        dy, dstate = _rows_side_by_side(dy), dstate.contiguous()
        dx, ddt, dg, dB, dC = (torch.empty_like(u, memory_format=torch.contiguous_format) for u in (x, dt, log_decay, B, C))
        dD = None if D is None else torch.zeros_like(D, dtype=torch.float32)
        dgamma = None if gamma is None else torch.zeros_like(gamma, dtype=torch.float32)
        for (start, end), states, scores in reversed(list(zip(shape.segments(x.shape[1]), kept[::2], kept[1::2], strict=True))):
            here = slice(start, end)
            segment = _Segment(shape, (u[:, here] for u in (x, dt, log_decay, B, C)), D, gamma, scores)
            part, values = dy[:, here], segment.x
            dstates, dstate, energy = segment.carry(segment.queries, part, segment.reading, dstate, states)
            read = segment.read(segment.queries, states, part, segment.reading, transposed=False, partner=part)
            written = segment.read(segment.keys, dstates, part, segment.to_end, transposed=True, out=dx[:, here], partner=values)
            dscores, rows, columns, own, inside, skip = segment.pair_gradients(part)
            segment.step_gradients(energy, ddt[:, here], dg[:, here], read, written, rows, columns, own, inside)
            if dD is not None:
                dD += skip.sum((0, 2))
            dqueries, dkeys = (segment.destination(grad[:, here]) for grad in (dC, dB))
            segment.project(part, segment.reading, states, dscores, segment.keys, dqueries, transposed=False)
            segment.project(values, segment.writing, dstates, dscores, segment.queries, dkeys, transposed=True)
            if not shape.straight:
                more, _ = segment.query_rows.take_apart(segment.C, dqueries, dC[:, here])
                segment.key_rows.take_apart(segment.B, dkeys, dB[:, here])
                dgamma = None if dgamma is None or more is None else dgamma + more
        dD, dgamma = (None if grad is None else grad.to(u.dtype) for grad, u in ((dD, D), (dgamma, gamma)))
        return dx, ddt, dg, dB, dC, dD, dgamma, dstate, None
