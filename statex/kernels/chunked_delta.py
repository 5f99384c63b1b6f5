"""The (gated) delta rule by chunks, in PyTorch, for keys of any length and gates of any strength.

Inside a chunk the writes u_t = beta_t (v_t - k_t exp(g_t) S_{t-1}) depend on one another linearly: (I + L) u = right-hand side,
with a strictly lower L (the WY representation of arXiv 2406.06484; with gates, arXiv 2412.06464). The inverse of I + L is made of
contractions, so its entries stay small, where those of its Neumann series do not. Exponentials are taken of sums of log-decays,
never of differences of such sums. Nothing here looks at values, so code that is compiled or captured runs the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked_ssd import segment_sums
from .chunking import Packing, chunk_length, fold, run_segments, unfold


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
    key_dim = k.shape[-1]
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    chunk = chunk_length(tokens, key_dim, value_dim)
    if initial_state is None:
        initial_state = v.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype)
    per_head = 5 * key_dim + 6 * value_dim + 8 * chunk + 3 * key_dim * value_dim // chunk

    def segment(*inputs: Any) -> tuple[Tensor, Tensor]:
        *rows, carried, packing = inputs
        return _segment(*rows, state=carried, packing=packing, scale=scale, chunk=chunk, dtype=dtype)

    o, state = run_segments(
        segment,
        (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay),
        (),
        initial_state.to(dtype),
        chunk=chunk,
        elements_per_token=batch * heads * per_head,
        cu_seqlens=cu_seqlens,
    )
    return o, state if output_final_state else None


def _segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    packing: Packing | None,
    scale: float,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, t, H, V]` and the state after a run of whole chunks. Inside: `[B, H, n, C, ...]`."""
    tokens, heads, out_dtype = v.shape[1], v.shape[2], v.dtype
    q, k, v, beta = (fold(x, chunk, dtype) for x in (q, k, v, beta))
    q = _spread(scale * q, k.shape[1])
    scores, overlaps = _spread(q @ k.mT, heads), _spread(k @ k.mT, heads)
    q, k = _spread(q, heads), _spread(k, heads)
    scores, overlaps, reading, writing, passing = _decayed(scores, overlaps, log_decay, packing, chunk, dtype)
    inverse = unit_lower_inverse(overlaps * beta[..., None])
    # Columns of the right-hand side: what is written without a past, and what of the past it replaces.
    written = inverse @ (beta[..., None] * v)
    replaced = inverse @ ((beta if reading is None else beta * reading)[..., None] * k)
    writer = k if writing is None else k * writing[..., None]
    before, writes, state = _carry(written, replaced, writer, passing, state)
    o = q @ before
    if reading is not None:
        o = o * reading[..., None]
    return unfold(o + scores @ writes, tokens).to(out_dtype), state


def _spread(x: Tensor, heads: int) -> Tensor:
    """`[B, h, ...]` to `[B, heads, ...]`: every head several times, where heads are shared."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _decayed(
    scores: Tensor, overlaps: Tensor, log_decay: Tensor | None, packing: Packing | None, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gates and borders of sequences.

    Args:
        scores, overlaps: `[B, H, n, C, C]`.
        log_decay: `[B, t, H]`.

    Returns:
        scores, with 0 where the column's token comes after the row's, and overlaps, both decayed from the column's token to the
        row's, with 0 between sequences;
        reading `[B, H, n, C]`, the decay from the chunk's start, 0 where the carried state is another sequence's;
        writing `[B, H, n, C]`, the decay to the chunk's end, 0 where the sequence ends before;
        passing `[B, H, n]`, the decay of the whole chunk, 0 where a sequence ends. None for factors of 1.
    """
    reading = writing = passing = None
    if log_decay is not None:
        g = fold(log_decay, chunk, dtype)
        sums = segment_sums(g)
        decays = sums.exp()
        scores, overlaps = scores * decays, overlaps * decays
        since_start = sums[..., 0] + g[..., :1]
        reading, writing, passing = since_start.exp(), decays[..., -1, :], since_start[..., -1].exp()
    else:
        scores = scores.tril()
    if packing is not None:
        if reading is None:
            reading = scores.new_ones(scores.shape[:-1])
            writing, passing = reading, reading[..., 0]
        assert writing is not None
        assert passing is not None
        scores, overlaps = scores.masked_fill(~packing.same, 0), overlaps.masked_fill(~packing.same, 0)
        reading, writing = reading.masked_fill(~packing.reads, 0), writing.masked_fill(~packing.writes, 0)
        passing = passing.masked_fill(~packing.passes, 0)
    return scores, overlaps, reading, writing, passing


def _carry(
    written: Tensor, replaced: Tensor, writer: Tensor, passing: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the state from chunk to chunk: u = written - replaced S, then S = passing · S + writerᵀ u.

    Args:
        written: `[B, H, n, C, V]`. replaced, writer: `[B, H, n, C, K]`. passing: `[B, H, n]`. state: `[B, H, K, V]`.

    Returns:
        States in front of each chunk `[B, H, n, K, V]`, writes u `[B, H, n, C, V]`, and the state after the last.
    """
    leading = written.shape[:2]
    state = state.flatten(0, 1)
    chunks = zip(*(x.flatten(0, 1).unbind(1) for x in (written, replaced, writer.mT)), strict=True)
    factors = None if passing is None else passing.flatten(0, 1)[..., None, None].unbind(1)
    before, writes = [], []
    for c, (fresh, stale, keys) in enumerate(chunks):
        before.append(state)
        writes.append(torch.baddbmm(fresh, stale, state, alpha=-1))
        state = torch.baddbmm(state if factors is None else factors[c] * state, keys, writes[-1])
    states, written = (torch.stack(parts, 1).unflatten(0, leading) for parts in (before, writes))
    return states, written, state.unflatten(0, leading)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ where L is what lies below the diagonal of `lower`, `[..., C, C]`, C a power of two; the rest is not read."""
    inverse: Tensor = _UnitLowerInverse.apply(lower)
    return inverse


class _UnitLowerInverse(torch.autograd.Function):
    """With a backward of its own, which keeps one matrix where the recursion would keep two a level."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = _invert(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradient @ inverse.mT).tril(-1)


def _invert(lower: Tensor) -> Tensor:
    """From halves to wholes: the inverse of [[A, 0], [X, B]] is [[A⁻¹, 0], [-B⁻¹ X A⁻¹, B⁻¹]]."""
    size = lower.shape[-1]
    inverse, block = lower.new_ones(*lower.shape[:-2], size, 1, 1), 1
    while block < size:
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        corners = lower.unflatten(-1, (-1, 2 * block)).unflatten(-3, (-1, 2 * block)).diagonal(0, -4, -2).movedim(-1, -3)
        corner = corners[..., block:, :block]
        # Products of single numbers need no matrix product.
        corner = -(second * corner * first if block == 1 else second @ corner @ first)
        inverse = torch.cat([F.pad(first, (0, block)), torch.cat([corner, second], -1)], -2)
        block *= 2
    return inverse.squeeze(-3)
