"""Gated linear attention by chunks, in PyTorch: matrix products inside a chunk, one state between chunks.

Exactness at every gate strength rests on one rule: exponentials are taken of sums of log-decays, never of differences of such
sums, so that no exponent is positive, nothing overflows and no digits cancel. A block is built from its halves: its lower left
quarter joins the second half's queries, decayed from their start, to the first half's keys, decayed to their end. Where the gates
are mild one product with a reference in the middle of the block does it all.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunking import Packing, carry, chunk_length, fold, halves, mild_block, run_segments, unfold
from .lift import channel_mixing, lift_factor, lifted_key, lifted_query


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
    value_dim, group = v.shape[-1], q.shape[2] // heads
    factor = lift_factor(lift_gamma, key_dim)
    state_key_dim, blocks = factor * key_dim, 1 if mixing is None else mixing.shape[-1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    chunk = chunk_length(tokens, state_key_dim, value_dim)
    if initial_state is None:
        initial_state = q.new_zeros(batch, heads, state_key_dim, value_dim, dtype=dtype)
    score_sets = blocks * group
    per_head = 4 * (group + 1) * state_key_dim + (group + 1) * value_dim + 4 * score_sets * chunk
    o, state = run_segments(
        partial(_segment, scale=scale, chunk=chunk, dtype=dtype),
        (q, k, v, log_decay),
        (mixing, lift_gamma),
        initial_state.to(dtype),
        chunk=chunk,
        elements_per_token=batch * heads * (per_head + 2 * state_key_dim * value_dim // chunk),
        cu_seqlens=cu_seqlens,
    )
    return o, state if output_final_state else None


def _segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    mixing: Tensor | None,
    lift_gamma: Tensor | None,
    state: Tensor,
    packing: Packing | None,
    *,
    scale: float,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, t, Hq, V]` and the state after a run of whole chunks. Inside: `[B, H, n, C, ...]`."""
    tokens, heads, key_dim = k.shape[1:]
    out_dtype, factor = q.dtype, lift_factor(lift_gamma, key_dim)
    q = fold(q.unflatten(2, (heads, -1)), chunk, dtype)
    k, v, g = (fold(x, chunk, dtype) for x in (k, v, log_decay))
    if lift_gamma is not None:
        gamma = lift_gamma.to(dtype).unflatten(0, (heads, 1, 1, -1))
        q, k = lifted_query(q, gamma), lifted_key(k, factor)
    if mixing is None:
        scores, reader, writer, total = _decayed_scores(q, k, g, packing)
        scores, reader, values = scores.flatten(3, 4), reader.flatten(3, 4), v
    else:
        scores, reader, writer, total = _mixed_scores(q, k, g, mixing.to(dtype), factor, packing)
        values = _value_blocks(v, mixing.shape[-1])
    if packing is not None:
        total = total.masked_fill(~packing.passes[:, None], -torch.inf)
    before, state = carry(writer.mT @ v, total.repeat(1, 1, 1, factor)[..., None], state)
    if mixing is not None:
        before = _value_blocks(before, mixing.shape[-1])
    inside = (scores @ values).flatten(0, -3)
    o = torch.baddbmm(inside, reader.flatten(0, -3), before.flatten(0, -3), beta=scale, alpha=scale)
    o = o.unflatten(0, scores.shape[:-2]).unflatten(-2, (chunk, -1))
    if mixing is not None:
        o = o.movedim(3, 5).flatten(5)
    return unfold(o, tokens).flatten(2, 3).to(out_dtype), state


def _value_blocks(x: Tensor, blocks: int) -> Tensor:
    """Values or states by value block: `[B, H, n, ?, V]` to `[B, H, n, f, ?, V/f]`."""
    return x.unflatten(-1, (blocks, -1)).movedim(-2, 3)


def _mixed_scores(
    q: Tensor, k: Tensor, g: Tensor, mixing: Tensor, factor: int, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_decayed_scores` where value block j is read with `q * mixing[..., j]`: scores and readers are `[B, H, n, f, C·R, ...]`."""
    blocks, key_dim, group = mixing.shape[-1], g.shape[-1], q.shape[-2]
    per_channel = channel_mixing(mixing, factor, key_dim).mT[:, None]
    if mixing.shape[1] == key_dim:
        queries = (q.unsqueeze(-2) * per_channel.unsqueeze(2).unsqueeze(2)).flatten(4, 5)
        scores, reader, writer, total = _decayed_scores(queries, k, g, packing)
        scores, reader = (x.unflatten(4, (group, blocks)).movedim(5, 3).flatten(4, 5) for x in (scores, reader))
        return scores, reader, writer, total
    # One number for each pair of blocks: scores of each key block once, then their combinations.
    q, k = (x.unflatten(-1, (factor, blocks, -1)).movedim(-2, 3).flatten(-2) for x in (q, k))
    by_key_block = _decayed_scores(q, k, g.unflatten(-1, (blocks, -1)).movedim(-2, 3), packing)
    scores = torch.einsum("bhnicrs,hij->bhnjcrs", by_key_block[0], mixing).flatten(4, 5)
    reader, writer = (x.unflatten(-1, (factor, -1)).movedim(3, -2).flatten(-3) for x in by_key_block[1:3])
    return scores, reader.flatten(3, 4).unsqueeze(3) * per_channel.unsqueeze(3), writer, by_key_block[3].flatten(-2)


def _decayed_scores(q: Tensor, k: Tensor, g: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything that decays inside chunks.

    Args:
        q: `[..., C, R, L·K]`, R queries to a key.
        k: `[..., C, L·K]`, L parts of a lifted key that share decays.
        g: log-decays `[..., C, K]`.
        packing: sequences that must not meet; leading dimensions are then `[B, H, n]`, or `[B, H, n, f]`.

    Returns:
        scores `[..., C, R, C]`, Σ_c q_ic k_jc exp(g_{j+1,c} + ... + g_ic) for j <= i, else 0;
        reader `[..., C, R, L·K]`, q decayed from the chunk's start;
        writer `[..., C, L·K]`, k decayed to the chunk's end;
        Σ g `[..., K]`.
    """
    leading, (chunk, group, channels) = q.shape[:-3], q.shape[-3:]
    size = mild_block(g)
    blocks = q.reshape(-1, size, group, channels), k.reshape(-1, size, channels), g.reshape(-1, size, g.shape[-1])
    scores, reader, writer, total = _mild_scores(*blocks) if size > 1 else _single_tokens(*blocks)
    while size < chunk:
        # The lower left quarter: the second half's readers start, and the first half's writers end, at the border between them.
        s1, s2 = halves(scores)
        r1, r2 = halves(reader)
        w1, w2 = halves(writer)
        t1, t2 = halves(total)
        crossing = (r2.flatten(1, 2) @ w1.mT).unflatten(1, (size, group))
        scores = torch.cat([F.pad(s1, (0, size)), torch.cat([crossing, s2], -1)], 1)
        reader = torch.cat([r1, _decayed(r2, t1[:, None])], 1)
        writer = torch.cat([_decayed(w1, t2[:, None]), w2], 1)
        total = t1 + t2
        size *= 2
    scores, reader, writer, total = (x.unflatten(0, leading) for x in (scores, reader, writer, total))
    if packing is None:
        return scores, reader, writer, total
    same, reads, writes = (
        mask.unflatten(0, (-1, *[1] * (len(leading) - 3))) for mask in (packing.same, packing.reads, packing.writes)
    )
    scores = scores.masked_fill(~same.unsqueeze(-2), 0)
    return scores, reader.masked_fill(~reads[..., None, None], 0), writer.masked_fill(~writes[..., None], 0), total


def _single_tokens(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_decayed_scores` of blocks of one token, `[X, 1, ...]`: nothing decays between a key and its own query."""
    return (q * k.unsqueeze(2)).sum(-1, keepdim=True), _decayed(q, g), k, g[:, 0]


def _mild_scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_decayed_scores` of blocks whose halves decay by at most MILD nats, `[X, size, ...]`: all pairs from the middle at once."""
    size, group = q.shape[1:3]
    since_start = g.cumsum(1)
    middle, total = since_start[:, size // 2 - 1, None], since_start[:, -1]
    from_middle = since_start - middle
    queries, keys = _decayed(q, from_middle), _decayed(k, -from_middle)
    scores = (queries.flatten(1, 2) @ keys.mT).unflatten(1, (size, group))
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~causal[:, None], 0), _decayed(queries, middle), _decayed(keys, total[:, None] - middle), total


def _decayed(x: Tensor, log_decay: Tensor) -> Tensor:
    """`x` times exp(log_decay): `[X, C or 1, K]` decays applied to `[X, C, L·K]` or `[X, C, R, L·K]`."""
    decay = log_decay.exp()
    if x.dim() > log_decay.dim():
        decay = decay.unsqueeze(-2)
    if x.shape[-1] == decay.shape[-1]:
        return x * decay
    return (x.unflatten(-1, (-1, decay.shape[-1])) * decay.unsqueeze(-2)).flatten(-2)
