"""The (gated) delta rule on a GPU: what `statex.kernels.delta_rule` computes, forward and backward.

Chunks of BLOCK tokens make their triangular inverses and scores by themselves; then states go from chunk to chunk; then all chunks
make their outputs. Backward it goes the same way, with the gradient of the state. Kept between the passes are, besides the inputs,
inverses, scores, writes and the states in front of all chunks, if they fit SEGMENT_BYTES. Otherwise time is cut into segments, of
which only the first state is kept, and the backward pass makes the rest again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import by_head, delta_gradients, delta_kernels, layout
from .layout import (
    BLOCK,
    Operands,
    ceil_div,
    forget_at_borders,
    on_own_device,
    operands,
    pad_to,
    padded,
    power_of_2,
    require_grid,
    segments,
    tile,
    unit_stride,
)

SHARED_MEMORY = 200 << 10
"""Bytes of shared memory that a program may need, compiled for an H100 by Triton 3.6."""


@torch.compiler.disable
@on_own_device
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results of `statex.kernels.delta_rule`, but packed sequences start from zero states and return none."""
    batch, tokens, heads, value_dim = v.shape
    key_dim, out_dtype, how = k.shape[-1], v.dtype, operands(v)
    require_grid(batch * heads)
    if how.dtype == torch.bfloat16:
        q, (k, beta) = q.to(how.dtype), _rounded(k, beta)
    else:
        q, k, v = q.float(), k.float(), v.float()
    channels, width = pad_to(key_dim, BLOCK), 32 if value_dim <= 32 else pad_to(value_dim, BLOCK)
    shape = _Shape(batch, heads, heads // q.shape[2], heads // k.shape[2], channels, width, scale, how)
    whole = pad_to(tokens, BLOCK)
    if log_decay is None and cu_seqlens is not None:
        log_decay = torch.zeros_like(beta, dtype=torch.float32)
    if log_decay is not None:
        log_decay = padded(forget_at_borders(log_decay.float(), cu_seqlens), 1, whole).contiguous()
    q, k = (unit_stride(padded(padded(u, 3, channels), 1, whole)) for u in (q, k))
    v = unit_stride(padded(padded(v, 3, width), 1, whole))
    beta = padded(beta.float(), 1, whole).contiguous()
    if initial_state is None:
        state = torch.zeros(batch, heads, channels, width, dtype=torch.float32, device=v.device)
    else:
        state = padded(padded(initial_state.float(), 3, width), 2, channels).contiguous()
    o, state = _Delta.apply(q, k, v, beta, log_decay, state, shape)
    o = o[:, :tokens, :, :value_dim].to(out_dtype)
    return o, state[:, :, :key_dim, :value_dim] if output_final_state else None


def _rounded(k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Keys in bfloat16, and betas under which a step multiplies what a key holds by what it would without the rounding.

    With betas near 2 that factor is near -1, and where it got beyond, states would grow without bound.
    """
    if k.dtype == torch.bfloat16:
        return k, beta
    rounded = k.to(torch.bfloat16)
    with torch.no_grad():
        exact, found = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (k, rounded))
        factor = torch.where(found > 0, exact / found, 1.0).square()
    return rounded, beta * factor.repeat_interleave(beta.shape[-1] // factor.shape[-1], -1)


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call. `readers` heads share a query, `writers` heads a key."""

    batch: int
    heads: int
    readers: int
    writers: int
    key_dim: int
    """Padded to whole blocks, as are values."""
    value_dim: int
    scale: float
    how: Operands

    def segments(self, tokens: int) -> list[tuple[int, int]]:
        """One, if all that is kept between the passes fits; else such whose scratch does in both passes."""
        per_head = 2 * BLOCK + self.value_dim + self.key_dim * self.value_dim // BLOCK
        per_token = self.batch * self.heads * self.how.dtype.itemsize * per_head
        return [(0, tokens)] if per_token * tokens <= layout.SEGMENT_BYTES else segments(tokens, BLOCK, 2 * per_token)


@dataclass(frozen=True)
class Launch:
    """Columns of the result that a program makes, channels that it sums over at once, Triton's warps and stages."""

    columns: int
    block: int
    num_warps: int
    num_stages: int


LAUNCHES = {
    "prepare": Launch(64, 64, 4, 2),
    "read": Launch(128, 64, 4, 3),
    "pairs": Launch(64, 64, 4, 2),
    "rows": Launch(64, 64, 4, 2),
}
"""For bfloat16. Nothing is tuned at run time, so that the first step comes soon."""


@dataclass(frozen=True)
class Carry:
    """How a program carries states over chunks: their columns (under 64), channels of keys in a block, whether a chunk's rows are
    held from reading to writing, Triton's warps and stages."""

    columns: int
    block: int
    held: bool
    num_warps: int
    num_stages: int


CARRIES: dict[str, dict[int, Carry]] = {
    "states": {
        128: Carry(32, 64, True, 8, 2),
        256: Carry(32, 64, True, 8, 2),
        512: Carry(16, 128, True, 8, 2),
        1024: Carry(16, 128, True, 8, 1),
        2048: Carry(16, 256, False, 8, 1),
    },
    "gradients": {
        128: Carry(32, 128, True, 4, 1),
        256: Carry(32, 128, True, 8, 2),
        512: Carry(16, 128, True, 8, 2),
        1024: Carry(16, 256, False, 8, 1),
        2048: Carry(16, 256, False, 8, 1),
    },
    "wide states": {
        128: Carry(32, 64, True, 8, 1),
        256: Carry(32, 64, True, 8, 1),
        512: Carry(16, 128, False, 8, 1),
        1024: Carry(16, 128, False, 8, 1),
        2048: Carry(16, 128, False, 8, 1),
    },
    "wide gradients": {
        128: Carry(32, 64, True, 8, 1),
        256: Carry(32, 64, True, 8, 1),
        512: Carry(16, 128, False, 8, 1),
        1024: Carry(16, 128, False, 8, 1),
        2048: Carry(16, 128, False, 8, 1),
    },
}
"""For bfloat16 operands and, wide, for float32 ones, by channels of keys at most."""


def longest_key(v: Tensor) -> int:
    """Channels of the longest keys that go with such values."""
    kind = "" if operands(v).dtype == torch.bfloat16 else "wide "
    return min(max(CARRIES[kind + name]) for name in ("states", "gradients"))


class _Segment:
    """Scratch of one run of chunks: what both passes make from its inputs."""

    def __init__(self, shape: _Shape, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
        self.shape, self.q, self.k, self.v, self.g = shape, q, k, v, log_decay
        self.tokens = v.shape[1]
        self.chunks = self.tokens // BLOCK
        self.programs = shape.batch * shape.heads
        self._sums(beta)

    def scratch(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised `[*sizes]`, of operands' dtype by default."""
        return torch.empty(*sizes, dtype=dtype or self.shape.how.dtype, device=self.q.device)

    def per_token(self, *sizes: int) -> Tensor:
        """Uninitialised `[*sizes, B * H, tokens]`, float32."""
        return self.scratch(*sizes, self.programs, self.tokens, dtype=torch.float32)

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Of batch, time and heads of rows `[B, t, H, D]`."""
        return x.stride(0), x.stride(1), x.stride(2)

    def _sums(self, beta: Tensor) -> None:
        """Betas head by head; and, with gates, sums of decays and what follows from them: see `by_head.step_sums`."""
        s, g = self.shape, self.g
        if g is None:
            self.beta = beta.transpose(1, 2).contiguous()
            self.hi = self.lo = self.reading = self.to_end = self.passing = self.beta
            return
        self.hi, self.lo, self.reading, self.to_end, written, self.beta = self.per_token(6)
        self.passing = self.scratch(s.batch, s.heads, self.chunks, dtype=torch.float32)
        width = min(by_head.HEADS, power_of_2(s.heads))
        # A group of one head: sums of chunks then lie head by head.
        by_head.step_sums[(ceil_div(s.heads, width), self.chunks, s.batch)](
            g, beta, self.hi, self.lo, self.reading, self.to_end, written, self.beta, self.passing,
            g.stride(0), g.stride(1), beta.stride(0), beta.stride(1), self.chunks, s.heads, 1, CHUNK=BLOCK, BH=width, num_warps=4,
        )  # fmt: skip

    def _launch(self, name: str, columns: int, block: int) -> tuple[int, int, dict[str, Any]]:
        """Columns and block, of sizes that divide those given, and the options. float32 operands take twice the shared memory."""
        launch, narrow = LAUNCHES[name], self.shape.how.dtype != torch.float32
        bn = tile(columns, launch.columns if narrow else min(launch.columns, 64), 64, 32)
        bk = tile(block, launch.block, 64, 32)
        stages = launch.num_stages if narrow else min(launch.num_stages, 2)
        return bn, bk, self.options(launch.num_warps, stages)

    def options(self, num_warps: int, num_stages: int) -> dict[str, Any]:
        how = self.shape.how
        return {"GATED": self.g is not None, "PRECISION": how.precision, "num_warps": num_warps, "num_stages": num_stages}

    def prepare(self) -> tuple[Tensor, Tensor]:
        """Triangular inverses and scores, `[B * H, tokens, BLOCK]`."""
        s, q, k = self.shape, self.q, self.k
        inverse, scores = (self.scratch(self.programs, self.tokens, BLOCK) for _ in range(2))
        _, bk, options = self._launch("prepare", BLOCK, s.key_dim)
        delta_kernels.prepare_chunks[(self.chunks, self.programs)](
            q, k, self.beta, self.hi, self.lo, inverse, scores, *self.strides(q), *self.strides(k),
            s.heads, s.readers, s.writers, self.tokens, s.key_dim, s.scale, BK=bk, **options,
        )  # fmt: skip
        return inverse, scores

    def _carry_form(self, name: str) -> tuple[int, dict[str, Any]]:
        """Columns of the state that a program carries, and the kernels' options."""
        s = self.shape
        table = CARRIES[name if s.how.dtype == torch.bfloat16 else f"wide {name}"]
        carry = next(carry for longest, carry in table.items() if s.key_dim <= longest)
        bv, bk = tile(s.value_dim, carry.columns, 32), tile(s.key_dim, carry.block, BLOCK)
        options = self.options(carry.num_warps, carry.num_stages)
        return bv, {"BLOCKS": s.key_dim // bk, "HELD": carry.held, "BK": bk, "BV": bv, **options}

    def carry(self, inverse: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States in front of all chunks `[B * H, chunks, K, V]`, writes `[B * H, tokens, V]`, and the state after the last."""
        s = self.shape
        states = self.scratch(self.programs, self.chunks, s.key_dim, s.value_dim)
        writes, end = self.scratch(self.programs, self.tokens, s.value_dim), torch.empty_like(start)
        bv, options = self._carry_form("states")
        delta_kernels.carry_states[(s.value_dim // bv, self.programs)](
            self.k, self.v, inverse, self.beta, self.reading, self.to_end, self.passing, start, states, writes, end,
            *self.strides(self.k), *self.strides(self.v), s.heads, s.writers, self.tokens, s.value_dim, **options,
        )  # fmt: skip
        return states, writes, end

    def read(self, states: Tensor, scores: Tensor, writes: Tensor, out: Tensor) -> None:
        """Outputs into `out` `[B, tokens, H, V]`."""
        s, q = self.shape, self.q
        bv, bk, options = self._launch("read", s.value_dim, s.key_dim)
        delta_kernels.read_states[(s.value_dim // bv, self.chunks, self.programs)](
            q, states, scores, writes, self.reading, out, *self.strides(q), *self.strides(out),
            s.heads, s.readers, self.tokens, s.key_dim, s.value_dim, s.scale, BK=bk, BV=bv, **options,
        )  # fmt: skip

    def carry_gradients(
        self, do: Tensor, inverse: Tensor, scores: Tensor, dend: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the states behind all chunks, of what the inverses are multiplied by, and of the first state; those of
        values into `dv`."""
        s, q, k = self.shape, self.q, self.k
        dstates = self.scratch(self.programs, self.chunks, s.key_dim, s.value_dim)
        dnews, dstart = self.scratch(self.programs, self.tokens, s.value_dim), torch.empty_like(dend)
        bv, options = self._carry_form("gradients")
        delta_gradients.carry_gradients[(s.value_dim // bv, self.programs)](
            q, k, do, inverse, scores, self.beta, self.reading, self.to_end, self.passing, dend, dstates, dnews, dv, dstart,
            *self.strides(q), *self.strides(k), *self.strides(do), *self.strides(dv),
            s.heads, s.readers, s.writers, self.tokens, s.value_dim, s.scale, **options,
        )  # fmt: skip
        return dstates, dnews, dstart

    def pair_gradients(self, do: Tensor, writes: Tensor, dnews: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of queries' and keys' products with keys `[B * H, tokens, BLOCK]`, and of log-decays and betas so far."""
        s, k, v = self.shape, self.k, self.v
        dscores, doverlaps = torch.empty_like(scores), torch.empty_like(scores)
        inside, dbeta = self.per_token(2)
        bv, bk, options = self._launch("pairs", s.value_dim, s.key_dim)
        delta_gradients.pair_gradients[(self.chunks, self.programs)](
            k, v, do, writes, dnews, scores, self.beta, self.hi, self.lo, dscores, doverlaps, inside, dbeta,
            *self.strides(k), *self.strides(v), *self.strides(do),
            s.heads, s.writers, self.tokens, s.key_dim, s.value_dim, s.scale, BK=bk, BV=bv, **options,
        )  # fmt: skip
        return dscores, doverlaps, inside, dbeta

    def row_gradients(
        self, do: Tensor, states: Tensor, dstates: Tensor, writes: Tensor, dnews: Tensor, dscores: Tensor, doverlaps: Tensor,
        dq: Tensor, dk: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of queries and keys into `dq`, `dk` `[B, tokens, H, K]`; returns what they hold for gates, by slot."""
        s, q, k = self.shape, self.q, self.k
        bk, bv, options = self._launch("rows", s.key_dim, s.value_dim)
        slots = s.key_dim // bk
        asked, stale, written = self.per_token(3, slots) if self.g is not None else 3 * (self.per_token(slots),)
        ending = self.scratch(slots, self.programs, self.chunks, dtype=torch.float32)
        delta_gradients.row_gradients[(slots, self.chunks, self.programs)](
            q, k, do, states, dstates, writes, dnews, dscores, doverlaps, self.beta, self.reading, self.to_end, self.passing,
            dq, dk, asked, stale, written, ending,
            *self.strides(q), *self.strides(k), *self.strides(do), *self.strides(dq),
            s.heads, s.readers, s.writers, self.tokens, s.key_dim, s.value_dim, s.scale, BK=bk, BV=bv, **options,
        )  # fmt: skip
        return asked, stale, written, ending

    def gate_gradients(self, dbeta: Tensor, dg: Tensor | None, *parts: Tensor) -> None:
        """Gradients of betas and log-decays into `dbeta`, `dg` `[B, tokens, H]` from the other two's parts."""
        s = self.shape
        g, out = (dbeta, dbeta) if self.g is None or dg is None else (self.g, dg)
        slots = parts[2].shape[0]
        delta_gradients.gate_gradients[(self.chunks, self.programs)](
            g, self.beta, *parts, dbeta, out, g.stride(0), g.stride(1), dbeta.stride(0), dbeta.stride(1),
            s.heads, self.tokens, slots, GATED=self.g is not None, num_warps=1,
        )  # fmt: skip


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, state, shape):
        """Rows `[B, T, ...]` of whole chunks and padded channels; the state `[B, H, K, V]`, float32."""
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        kept: list[Tensor] = []
        parts = shape.segments(v.shape[1])
        for start, end in parts:
            segment = _Segment(shape, *_cut((q, k, v, beta, log_decay), start, end))
            inverse, scores = segment.prepare()
            first = state
            states, writes, state = segment.carry(inverse, first)
            segment.read(states, scores, writes, o[:, start:end])
            kept += [inverse, scores, states, writes] if len(parts) == 1 else [first]
        ctx.save_for_backward(q, k, v, beta, log_decay, *kept)
        ctx.shape = shape
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dstate):
        """Segments from the last to the first; several are made again, each from the state in front of it."""
        q, k, v, beta, log_decay, *kept = ctx.saved_tensors
        shape: _Shape = ctx.shape
        do, dstate = unit_stride(do), dstate.contiguous()
        per_value_head = (*v.shape[:3], shape.key_dim)
        dq, dk = (
            torch.empty(per_value_head, dtype=u.dtype if sharing == 1 else torch.float32, device=u.device)
            for u, sharing in ((q, shape.readers), (k, shape.writers))
        )
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        dbeta, dg = torch.empty_like(beta), None if log_decay is None else torch.empty_like(log_decay)
        parts = shape.segments(v.shape[1])
        for i, (start, end) in reversed(list(enumerate(parts))):
            segment = _Segment(shape, *_cut((q, k, v, beta, log_decay), start, end))
            if len(parts) == 1:
                inverse, scores, states, writes = kept
            else:
                inverse, scores = segment.prepare()
                states, writes, _ = segment.carry(inverse, kept[i])
            part, here = do[:, start:end], slice(start, end)
            dstates, dnews, dstate = segment.carry_gradients(part, inverse, scores, dstate, dv[:, here])
            dscores, doverlaps, inside, direct = segment.pair_gradients(part, writes, dnews, scores)
            rows = segment.row_gradients(part, states, dstates, writes, dnews, dscores, doverlaps, dq[:, here], dk[:, here])
            segment.gate_gradients(dbeta[:, here], None if dg is None else dg[:, here], direct, inside, *rows)
        dq, dk = (
            grad if sharing == 1 else grad.unflatten(2, (-1, sharing)).sum(3).to(u.dtype)
            for grad, u, sharing in ((dq, q, shape.readers), (dk, k, shape.writers))
        )
        return dq, dk, dv, dbeta, dg, dstate, None


def _cut(rows: tuple[Tensor | None, ...], start: int, end: int) -> list[Any]:
    return [None if x is None else x[:, start:end] for x in rows]
