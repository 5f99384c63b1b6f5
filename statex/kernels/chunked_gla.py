"""Gated linear attention by chunks, in PyTorch: matrix products inside a chunk, one state between chunks.

Exactness at every gate strength rests on one rule: exponentials are taken of sums of log-decays, never of differences of such
sums, so that no exponent is positive, nothing overflows and no digits cancel. A block of scores is built from its halves: the
lower left quarter joins queries of the second half to keys of the first, with decays that run from the middle outwards. Where the
gates are mild (checked on a CPU, where looking is free) one product with a reference in the middle of the block does it all.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunking import Packing, carry, chunk_length, fold, mild_block, run_segments, unfold
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
    q = q * scale
    gains = None if mixing is None else mixing.to(dtype)
    scores, since_start, until_end = _scores(q, k, g, gains, factor)
    total = since_start[..., -1, :]
    if packing is not None:
        scores = scores.masked_fill(~packing.same[:, :, None, :], 0)
        since_start = since_start.masked_fill(~packing.reads[..., None], -torch.inf)
        until_end = until_end.masked_fill(~packing.writes[..., None], -torch.inf)
        total = total.masked_fill(~packing.passes[:, None], -torch.inf)
    updates = _decayed(k, until_end).mT @ v
    before, state = carry(updates, total.repeat(1, 1, 1, factor)[..., None], state)
    reader = _decayed(q, since_start)
    if gains is None:
        o = scores.flatten(3, 4) @ v + reader.flatten(3, 4) @ before
        o = o.unflatten(3, (chunk, -1))
    else:
        o = _read_blocks(scores, v, reader, before, channel_mixing(gains, factor, key_dim))
    return unfold(o.to(out_dtype), tokens).flatten(2, 3), state


def _read_blocks(scores: Tensor, v: Tensor, reader: Tensor, before: Tensor, gains: Tensor) -> Tensor:
    """Value block j read with the query times `gains[..., j]`: `[B, H, n, C, R, V]`.

    scores: `[B, H, n, C, R·f, C]`, blocks innermost; v: `[B, H, n, C, V]`; reader: `[B, H, n, C, R, K]`; before: `[B, H, n, K, V]`;
    gains: `[H, K, f]`.
    """
    blocks, group = gains.shape[-1], reader.shape[-2]
    chunk = v.shape[-2]
    by_block = scores.unflatten(4, (group, blocks)).movedim(5, 3).flatten(4, 5)
    values, states = (x.unflatten(-1, (blocks, -1)).movedim(-2, 3) for x in (v, before))
    readers = reader.flatten(3, 4).unsqueeze(3) * gains.mT[:, None, :, None, :]
    o = by_block @ values + readers @ states
    return o.unflatten(4, (chunk, group)).movedim(3, 5).flatten(5)


def _scores(q: Tensor, k: Tensor, g: Tensor, gains: Tensor | None, factor: int) -> tuple[Tensor, Tensor, Tensor]:
    """Causal scores `[..., C, R, C]` and the decays' sums from the chunk's start and to its end, `[..., C, K]`.

    With `gains`, scores come as `[..., C, R·f, C]`, one for each value block.
    """
    key_dim = g.shape[-1]
    if gains is None:
        return _decayed_scores(q, k, g)
    blocks = gains.shape[-1]
    if gains.shape[1] == key_dim:
        per_channel = channel_mixing(gains, factor, key_dim).mT[:, None, None, None]
        return _decayed_scores((q.unsqueeze(-2) * per_channel).flatten(4, 5), k, g)
    # One number per pair of blocks: scores of each key block once, then their combinations.
    q, k = (x.unflatten(-1, (factor, blocks, -1)).movedim(-2, 3).flatten(-2) for x in (q, k))
    scores, since_start, until_end = _decayed_scores(q, k, g.unflatten(-1, (blocks, -1)).movedim(-2, 3))
    mixed = torch.einsum("bhnicrs,hij->bhncrjs", scores, gains).flatten(4, 5)
    return mixed, since_start.movedim(3, -2).flatten(-2), until_end.movedim(3, -2).flatten(-2)


def _decayed_scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores_ij = Σ_c q_ic k_jc exp(g_{j+1,c} + ... + g_ic) for j <= i, else 0.

    Args:
        q: `[..., C, R, L·K]`, R queries to a key.
        k: `[..., C, L·K]`, L parts of a lifted key that share decays.
        g: `[..., C, K]`.

    Returns:
        Scores `[..., C, R, C]`, Σ_{s<=i} g_s and Σ_{s>i} g_s, both `[..., C, K]`.
    """
    leading, (chunk, group), channels = q.shape[:-3], q.shape[-3:-1], q.shape[-1]
    size = mild_block(g)
    q, k, g = q.reshape(-1, size, group, channels), k.reshape(-1, size, channels), g.reshape(-1, size, g.shape[-1])
    scores, since_start, until_end = _mild_scores(q, k, g)
    while size < chunk:
        (_, q2), (k1, _) = q.unflatten(0, (-1, 2)).unbind(1), k.unflatten(0, (-1, 2)).unbind(1)
        (a1, a2), (b1, b2) = since_start.unflatten(0, (-1, 2)).unbind(1), until_end.unflatten(0, (-1, 2)).unbind(1)
        s1, s2 = scores.unflatten(0, (-1, 2)).unbind(1)
        cross = (_decayed(q2, a2).flatten(1, 2) @ _decayed(k1, b1).mT).unflatten(1, (size, group))
        scores = torch.cat([F.pad(s1, (0, size)), torch.cat([cross, s2], -1)], 1)
        since_start = torch.cat([a1, a2 + a1[:, -1:]], 1)
        until_end = torch.cat([b1 + a2[:, -1:], b2], 1)
        q, k = q.reshape(-1, 2 * size, group, channels), k.reshape(-1, 2 * size, channels)
        size *= 2
    return scores.unflatten(0, leading), since_start.unflatten(0, leading), until_end.unflatten(0, leading)


def _mild_scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_decayed_scores` of blocks whose halves decay by at most MILD nats (or of single tokens), `[X, size, ...]`."""
    size, group = q.shape[1:3]
    if size == 1:
        return (q * k.unsqueeze(2)).sum(-1, keepdim=True), g, torch.zeros_like(g)
    since_start = g.cumsum(1)
    from_middle = since_start - since_start[:, size // 2 - 1, None]
    scores = (_decayed(q, from_middle).flatten(1, 2) @ _decayed(k, -from_middle).mT).unflatten(1, (size, group))
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~causal[:, None], 0), since_start, since_start[:, -1:] - since_start


def _decayed(x: Tensor, log_decay: Tensor) -> Tensor:
    """`x` times exp(log_decay): `[..., C, K]` decays applied to `[..., C, L·K]` or `[..., C, R, L·K]`."""
    decay = log_decay.exp()
    if x.dim() > log_decay.dim():
        decay = decay.unsqueeze(-2)
    if x.shape[-1] == decay.shape[-1]:
        return x * decay
    return (x.unflatten(-1, (-1, decay.shape[-1])) * decay.unsqueeze(-2)).flatten(-2)
