"""Gated linear attention on a GPU: what `statex.kernels.gla` computes, forward and backward, segment by segment.

A segment's rows and states live in scratch memory and are made again in the backward pass; kept are the inputs, the scores inside
chunks and one float32 state a segment. With bfloat16 inputs products and stored states are bfloat16 and every sum is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lift import channel_mixing, lift_factor
from . import blocks, gated, steep, together
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
    padded_parts,
    power_of_2,
    require_grid,
    segments,
    state_tiles,
    tile,
    unit_stride,
    without_padding,
)
from .rows import Rows, roots

STEEP = BLOCK // 2
"""Channels that a program of `steep` takes at once."""

SPAN = 512
"""Channels that it looks through for gradients: most find none, and each costs a launch slot."""


@torch.compiler.disable
@on_own_device
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    mixing: Tensor | None = None,
    lift_gamma: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results of `statex.kernels.gla`, but packed sequences start from zero states and return none."""
    batch, tokens, heads, key_dim = k.shape
    state_dim = key_dim * lift_factor(lift_gamma, key_dim)
    parts = 1 if mixing is None else mixing.shape[-1]
    width, out_dtype = v.shape[-1] // parts, q.dtype
    how = operands(q, k, v)
    if how.dtype != torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    channels, padded_width = pad_to(state_dim, BLOCK), pad_to(width, BLOCK)
    shape = _Shape(
        batch=batch,
        heads=heads,
        group=q.shape[2] // heads,
        parts=parts,
        key_dim=key_dim,
        state_dim=state_dim,
        channels=channels,
        values=parts * padded_width,
        chunk=chunk_length(tokens, channels, parts * padded_width, how.dtype == torch.float32),
        scale=scale,
        how=how,
        straight=mixing is None and lift_gamma is None and channels == key_dim,
        differentiable=needs_gradient(q, k, v, log_decay, mixing, lift_gamma, initial_state),
    )
    require_grid(batch * heads * shape.readers)
    whole = pad_to(tokens, shape.chunk)
    q, k, v, log_decay = (padded(unit_stride(x), 1, whole) for x in (q, k, v, forget_at_borders(log_decay, cu_seqlens)))
    v = padded_parts(v, parts, padded_width)
    if initial_state is None:
        initial_state = torch.zeros(batch, heads, channels, shape.values, dtype=torch.float32, device=q.device)
    else:
        initial_state = padded(padded_parts(initial_state.float(), parts, padded_width), 2, channels).contiguous()
    if mixing is not None:
        mixing = channel_mixing(mixing, 1, key_dim)
    kind = (dataclasses.replace(shape, batch=1, scale=1.0), q.dtype, log_decay.dtype, mixing is None, lift_gamma is None)
    end = shape.segments(whole)[0][1]
    first = (*(x[:, :end] for x in (q, k, v, log_decay)), mixing, lift_gamma, initial_state, shape)
    together.compile_pass(kind, _GLA, first, backward=shape.differentiable)
    o, state = _GLA.apply(q, k, v, log_decay, mixing, lift_gamma, initial_state, shape)
    o = without_padding(o[:, :tokens], parts, width).to(out_dtype)
    return o, without_padding(state[:, :, :state_dim], parts, width) if output_final_state else None


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call. Readers of a head: `group` queries times `parts` value blocks."""

    batch: int
    heads: int
    group: int
    parts: int
    key_dim: int
    state_dim: int
    """Channels of a lifted key."""
    channels: int
    """The same, padded to whole blocks."""
    values: int
    chunk: int
    scale: float
    how: Operands
    straight: bool
    """Keys and queries are used as they come: nothing lifted, mixed or padded."""
    differentiable: bool
    """A backward pass may follow."""

    @property
    def readers(self) -> int:
        return self.group * self.parts

    @property
    def lift(self) -> int:
        return self.state_dim // self.key_dim

    @property
    def part_width(self) -> int:
        return self.values // self.parts

    def segments(self, tokens: int) -> list[tuple[int, int]]:
        size, rows = self.how.dtype.itemsize, 1 + self.readers
        states, scores = size * self.channels * self.values // self.chunk, size * self.readers * self.chunk
        held = 2 * size * rows * self.channels + states + scores
        if self.differentiable:
            held += self.channels * (4 * rows + 4 + (0 if self.straight else size * rows)) + scores
        return segments(tokens, self.chunk, self.batch * self.heads * held)


class _Segment:
    """Scratch of one run of chunks: what both passes make from its inputs."""

    def __init__(self, shape: _Shape, rows: Iterable[Tensor], gamma: Tensor | None, mixing: Tensor | None) -> None:
        q, k, v, g, q_root, k_root = rows
        self.shape, self.q, self.k, self.v, self.g = shape, q, k, v, g
        self.tokens = q.shape[1]
        self.chunks = self.tokens // shape.chunk
        s = shape
        self.query_rows = Rows(s.heads, s.lift, s.channels, gamma, mixing)
        self.key_rows = Rows(s.heads, s.lift, s.channels, None, None)
        self.roots = (q_root.contiguous(), k_root.contiguous()) if s.lift > 1 else (q_root, k_root)
        # Kernels leave padded channels as they are; products take them in.
        new = torch.zeros if s.channels > s.state_dim else torch.empty
        self.q_near = self.scratch(s.readers, self.tokens, s.channels, new=new)
        self.k_near = self.scratch(1, self.tokens, s.channels, new=new)
        same = s.chunk == BLOCK
        self.q_far = self.q_near if same else self.scratch(s.readers, self.tokens, s.channels, new=new)
        self.k_far = self.k_near if same else self.scratch(1, self.tokens, s.channels, new=new)
        self.block_decay = self.scratch(self.tokens // BLOCK, s.channels, dtype=torch.float32, new=new)
        self.chunk_decay = self.scratch(self.chunks, s.channels, dtype=torch.float32, new=new)
        launch = launch_of("lifted rows" if s.lift > 1 else "rows" if mixing is None else "mixed rows", s.how)
        together.launch(gated.decay_rows, (2 * ceil_div(s.key_dim, launch.columns), self.chunks, s.batch * s.heads))(
            *self.inputs, self.q_near, self.q_far, self.k_near, self.k_far, self.block_decay, self.chunk_decay,
            *self.sizes, **self.forms, BK=launch.columns, **launch.options(launch.rows, launch.columns),
        )  # fmt: skip

    def scratch(self, *sizes: int, dtype: torch.dtype | None = None, new: Callable[..., Tensor] = torch.empty) -> Tensor:
        """`[B, heads, *sizes]`, uninitialised unless `new` says otherwise."""
        s = self.shape
        return new(s.batch, s.heads, *sizes, dtype=dtype or s.how.dtype, device=self.q.device)

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the kernels of `gated` make rows of; they do not look at what a form lacks."""
        gamma, mixing = (self.q if extra is None else extra for extra in (self.query_rows.gamma, self.query_rows.mixing))
        return self.q, self.k, self.g, *self.roots, gamma, mixing

    @cached_property
    def sizes(self) -> tuple[Any, ...]:
        """Strides of queries, keys and log-decays, and sizes, as the kernels of `gated` take them."""
        s, q, k, g = self.shape, self.q, self.k, self.g
        queries = (q.stride(0), s.group * q.stride(2), q.stride(2), q.stride(1))
        others = (x.stride(dim) for x in (k, g) for dim in (0, 2, 1))
        return (*queries, *others, s.heads, self.tokens, s.channels, s.key_dim, s.state_dim, s.scale)

    @cached_property
    def forms(self) -> dict[str, Any]:
        """What the kernels of `gated` are compiled for."""
        s, rows = self.shape, self.query_rows
        gates = {"GATED": rows.gamma is not None, "MIXED": rows.mixing is not None}
        return {"GROUP": s.group, "PARTS": s.parts, "LIFT": s.lift, **gates, "CHUNK": s.chunk}

    @property
    def pairs(self) -> int:
        return (self.shape.chunk // BLOCK) ** 2

    def scores(self) -> Tensor:
        """Decayed scores `[B, heads, readers, t, chunk]`, written for blocks on and below the diagonal."""
        s = self.shape
        out = self.scratch(s.readers, self.tokens, s.chunk)
        launch = launch_of("scores", s.how)
        together.launch(gated.scores, (self.pairs, self.chunks, s.batch * s.heads * s.readers))(
            self.q_near, self.k_near, self.block_decay, out, self.tokens, s.channels,
            READERS=s.readers, CHUNK=s.chunk, PRECISION=s.how.precision, BK=BLOCK, **launch.options(BLOCK, BLOCK),
        )  # fmt: skip
        together.launch(steep.add_scores, (self.tokens // BLOCK, s.batch * s.heads * s.readers))(
            *self.inputs, self.block_decay, out, *self.sizes, **self.forms, PRECISION=s.how.precision, BK=STEEP,
            WIDTH=power_of_2(s.channels),
        )  # fmt: skip
        return out

    def carry(self, start: Tensor, grad: Tensor | None = None, states: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """States in front of every chunk and after the last, `[B, heads, chunks + 1, K, V]`; the last in float32; and energies.

        With `grad` (of the outputs) backward in time: gradients behind every chunk from that behind the last.
        """
        s, backward = self.shape, grad is not None
        launch = launch_of("carry", s.how)
        bk, bv = state_tiles(launch, s.channels, s.values, s.batch * s.heads, s.part_width)
        carried, end = self.scratch(self.chunks + 1, s.channels, s.values), torch.empty_like(start)
        grid = (s.values // bv, s.channels // bk, s.batch * s.heads)
        if grad is None:
            x, x_strides = self.k_far, [*self.k_far.stride()[:2], 0, 0, self.k_far.stride(3)]
            y, y_strides = self.v, [self.v.stride(0), self.v.stride(2), 0, self.v.stride(1)]
            energy, group = end, 1
        else:
            readers = self.q_far.stride(2)
            x, x_strides = self.q_far, [*self.q_far.stride()[:2], s.parts * readers, readers, s.channels]
            y, y_strides = grad, [grad.stride(0), s.group * grad.stride(2), grad.stride(2), grad.stride(1)]
            energy, group = torch.empty(grid[0], *self.chunk_decay.shape, dtype=torch.float32, device=end.device), s.group
        together.launch(blocks.carry_states, grid)(
            x, y, end, self.chunk_decay, start, carried, end, carried if states is None else states, energy,
            *x_strides, *y_strides, 0, 0, 0, s.heads, self.chunks, s.channels, s.values, s.part_width, 1,
            GROUP=group, CHUNK=s.chunk, BY_ROW=True, BACKWARD=backward, PRECISION=s.how.precision, BK=bk, BV=bv,
            **launch.options(bk, bv),
        )  # fmt: skip
        return carried, end, energy

    def read(self, x: Tensor, states: Tensor, scores: Tensor, y: Tensor, out: Tensor, *, transposed: bool) -> None:
        """Outputs into `out` `[B, t, Hq, V]`; transposed, gradients of values `[B, t, H, V]`."""
        s = self.shape
        launch = launch_of("read", s.how)
        bm, bn = min(s.chunk, launch.rows), tile(s.part_width, launch.columns, 128, 64)
        readers = x.stride(2)
        query = 1 if transposed else s.group  # value rows have one head where query rows have a group
        y_heads, o_heads = (s.group, 1) if transposed else (1, query)
        together.launch(blocks.read_states, (s.values // bn, self.tokens // bm, s.batch * s.heads * query))(
            x, states, scores, y, out, out, out, out, out, out, out, out,
            x.stride(0), x.stride(1), s.parts * readers, readers, s.channels,
            y.stride(0), y_heads * y.stride(2), y.stride(2), y.stride(1),
            out.stride(0), o_heads * out.stride(2), out.stride(2), out.stride(1), 0, 0, 0, 0, 0, 0,
            s.heads, self.tokens, self.chunks, s.channels, s.values, s.part_width, s.values,
            GROUP=s.group, PARTS=s.parts, CHUNK=s.chunk, TRANSPOSED=transposed, SCALAR=False, HAS_SKIP=False, SUMMED=False,
            WRITTEN=True, PRECISION=s.how.precision, BM=bm, BN=bn, BK=BLOCK, **launch.options(bm, bn),
        )  # fmt: skip

    def project(self, x: Tensor, states: Tensor, group: int, parts: int) -> Tensor:
        """x S_cᵀ over each part of the values, float32 `[B, heads, group * parts, t, K]`; x is `[B, t, heads * group, V]`."""
        s = self.shape
        out = self.scratch(group * parts, self.tokens, s.channels, dtype=torch.float32)
        launch = launch_of("project", s.how)
        bm, bn = min(s.chunk, launch.rows), tile(s.channels, launch.columns, 128, 64)
        together.launch(blocks.project, (s.channels // bn, self.tokens // bm, s.batch * s.heads * group * parts))(
            x, states, out, out, out, out, x.stride(0), group * x.stride(2), x.stride(2), x.stride(1), 0, 0, 0,
            *out.stride()[:4], 0, 0, 0,
            s.heads, self.tokens, self.chunks, s.channels, s.values, s.values // parts, 1,
            GROUP=group, PARTS=parts, CHUNK=s.chunk, WEIGHTED=False, TRIANGLE=False, TRANSPOSED=False,
            PRECISION=s.how.precision, BM=bm, BN=bn, BK=BLOCK, **launch.options(bm, bn),
        )  # fmt: skip
        return out

    def score_gradients(self, do: Tensor) -> Tensor:
        """Gradients of undecayed pairs, dO_i · v_j, laid out as the scores."""
        s, v = self.shape, self.v
        out = self.scratch(s.readers, self.tokens, s.chunk)
        together.launch(blocks.score_pairs, (self.pairs, self.chunks, s.batch * s.heads * s.readers))(
            do, v, out, do.stride(0), s.group * do.stride(2), do.stride(2), do.stride(1), v.stride(0), v.stride(2), v.stride(1),
            s.heads, self.tokens, s.part_width,
            GROUP=s.group, PARTS=s.parts, CHUNK=s.chunk, PRECISION=s.how.precision, BK=BLOCK,
            **launch_of("pairs", s.how).options(BLOCK, BLOCK),
        )  # fmt: skip
        return out

    def row_gradients(self, da: Tensor, dq_far: Tensor, dk_far: Tensor, dq: Tensor, dk: Tensor) -> Tensor:
        """Writes gradients of queries and keys `[B, heads, readers, t, K]` and returns those of log-decay sums, float32."""
        s = self.shape
        db = self.scratch(self.tokens, s.channels, dtype=torch.float32)
        launch = launch_of("row gradients", s.how)
        strides = (*dq.stride()[:4], dk.stride(0), dk.stride(1), dk.stride(3))
        together.launch(gated.row_gradients, (s.channels // launch.columns, self.tokens // BLOCK, s.batch * s.heads))(
            self.g, self.q_near, self.k_near, self.block_decay, da, dq_far, dk_far, dq, dk, db, *self.sizes[7:10], *strides,
            *self.sizes[10:], READERS=s.readers, CHUNK=s.chunk, PRECISION=s.how.precision, BK=launch.columns,
            **launch.options(launch.rows, launch.columns),
        )  # fmt: skip
        together.launch(steep.add_gradients, (ceil_div(s.channels, SPAN), self.tokens // BLOCK, s.batch * s.heads))(
            *self.inputs, self.block_decay, da, dq, dk, db, *self.sizes, *strides, **self.forms, PRECISION=s.how.precision,
            BK=STEEP, SPAN=SPAN,
        )  # fmt: skip
        return db

    def outputs(self, state: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the outputs `[B, t, Hq, V]`, given the state in front; the states, the scores, and the state behind."""
        scores = self.scores()
        states, state, _ = self.carry(state)
        self.read(self.q_far, states, scores, self.v, out, transposed=False)
        return states, scores, state

    def gradients(
        self, do: Tensor, dstate: Tensor, states: Tensor, scores: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Writes those of the rows, given that of the state behind; those of the state in front, γ and M."""
        s = self.shape
        dstates, dstate, energy = self.carry(dstate, do, states)
        self.read(self.k_far, dstates, scores, do, dv, transposed=True)
        dq_far, dk_far = self.project(do, states, s.group, s.parts), self.project(self.v, dstates, 1, 1)
        del dstates
        if s.straight:
            dq_rows, dk_rows = dq.unflatten(2, (s.heads, -1)).movedim(1, 3), dk.unsqueeze(3).movedim(1, 3)
        else:
            dq_rows, dk_rows = (torch.empty_like(far, dtype=s.how.dtype) for far in (dq_far, dk_far))
        db = self.row_gradients(self.score_gradients(do), dq_far, dk_far, dq_rows, dk_rows)
        self.decay_gradients(db, dk_far, energy, dg)
        if s.straight:
            return dstate, None, None
        self.key_rows.take_apart(self.k, dk_rows, dk)
        return dstate, *self.query_rows.take_apart(self.q, dq_rows, dq)

    def decay_gradients(self, db: Tensor, dk_far: Tensor, energy: Tensor, dg: Tensor) -> None:
        """Writes the gradient of log-decays `[B, t, heads, K]`; uses `dk_far` up."""
        s = self.shape
        together.launch(gated.decay_gradients, (ceil_div(s.key_dim, BLOCK), self.chunks, s.batch * s.heads))(
            db, dk_far, self.k_far, energy, dg, dg.stride(0), dg.stride(2), dg.stride(1),
            s.heads, self.tokens, s.channels, s.key_dim, energy.shape[0],
            LIFT=s.lift, CHUNK=s.chunk, BK=BLOCK, **launch_of("decay gradients", s.how).options(BLOCK, BLOCK),
        )  # fmt: skip


class _GLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, mixing, gamma, state, shape):
        """Rows `[B, T, ...]` of whole chunks and padded values; the state padded, float32."""
        o = torch.empty(*q.shape[:3], shape.values, dtype=v.dtype, device=q.device)
        rows = (q, k, v, log_decay, *((roots(q), roots(k)) if shape.lift > 1 else (q, k)))
        kept: list[Tensor] = []
        for start, end in shape.segments(q.shape[1]):
            segment = _Segment(shape, (x[:, start:end] for x in rows), gamma, mixing)
            states, scores, state = segment.outputs(state, o[:, start:end])
            if shape.differentiable:
                kept += [states, scores]
            del segment, states, scores  # before the next one takes its scratch
        ctx.save_for_backward(*rows, mixing, gamma, *kept)
        ctx.shape = shape
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dstate):
        """Segments from the last to the first, each made again from the state in front of it."""
        q, k, v, log_decay, q_root, k_root, mixing, gamma, *kept = ctx.saved_tensors
        rows = (q, k, v, log_decay, q_root, k_root)
        shape: _Shape = ctx.shape
        do, dstate = unit_stride(do), dstate.contiguous()
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in rows[:4]]
        dgamma = None if gamma is None else torch.zeros_like(gamma, dtype=torch.float32)
        dmixing = None if mixing is None else torch.zeros_like(mixing, dtype=torch.float32)
        for (start, end), states, scores in reversed(list(zip(shape.segments(do.shape[1]), kept[::2], kept[1::2], strict=True))):
            segment = _Segment(shape, (x[:, start:end] for x in rows), gamma, mixing)
            dstate, more_gamma, more_mixing = segment.gradients(
                do[:, start:end], dstate, states, scores, *(x[:, start:end] for x in grads)
            )
            del segment
            dgamma = None if dgamma is None or more_gamma is None else dgamma + more_gamma
            dmixing = None if dmixing is None or more_mixing is None else dmixing + more_mixing
        dgamma, dmixing = (None if grad is None else grad.to(x.dtype) for grad, x in ((dgamma, gamma), (dmixing, mixing)))
        return *grads, dmixing, dgamma, dstate, None
