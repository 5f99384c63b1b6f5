"""Mamba-2's state space model by chunks, in PyTorch (the SSD algorithm of arXiv 2405.21060).

B and C are shared by the heads of a group and never copied per head: their product is formed once per group, and decays and dt go
on x. Sums of log-decays are built up from halves, without differences of longer sums, so no digits cancel however strong the decay.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .chunking import Packing, carry, chunk_length, fold, halves, mild_block, run_segments, unfold
from .lift import lift_factor, lifted_key, lifted_query

BLOCK_BY_HEAD = 16
"""Tokens in a block that is worked on head by head, because its decays are strong or cannot be looked at."""


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
    state_dim = d_state * lift_factor(lift_gamma, d_state)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    chunk = chunk_length(tokens, state_dim, heads // groups * head_dim)
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, state_dim, head_dim, dtype=dtype)
    if log_decay is None:
        log_decay = dt.to(dtype) * A.to(dtype)
    state = initial_state.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3)
    per_group = 4 * state_dim + heads // groups * (4 * head_dim + 4 * chunk + 2 * state_dim * head_dim // chunk)
    y, state = run_segments(
        partial(_segment, chunk=chunk, dtype=dtype),
        (x, dt, log_decay, B, C),
        (D, lift_gamma),
        state,
        chunk=chunk,
        elements_per_token=batch * groups * per_group,
        cu_seqlens=cu_seqlens,
    )
    return y, state.transpose(2, 3).flatten(1, 2).contiguous() if output_final_state else None


def _segment(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    lift_gamma: Tensor | None,
    state: Tensor,
    packing: Packing | None,
    *,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, t, H, P]` and the state `[B, G, N, H/G, P]` after a run of whole chunks. Inside: `[B, G, n, C, ...]`."""
    tokens, groups, out_dtype = x.shape[1], B.shape[2], x.dtype
    x, dt, log_decay = (fold(u.unflatten(2, (groups, -1)), chunk, dtype) for u in (x, dt, log_decay))
    keys, queries = fold(B, chunk, dtype), fold(C, chunk, dtype)
    if lift_gamma is not None:
        gamma = lift_gamma.to(dtype)[:, None, None]
        keys, queries = lifted_key(keys, lift_factor(lift_gamma, keys.shape[-1])), lifted_query(queries, gamma)
    y, reading, writing, total = _within_chunks(queries @ keys.mT, x, dt, log_decay, packing)
    if packing is not None:
        total = total.masked_fill(~packing.passes[:, None], -torch.inf)
    updates = _product(keys.mT, x, writing)
    before, state = carry(updates, total[..., None, :, None], state)
    # In place: on a CPU, touching fresh memory costs more than the arithmetic.
    y.addcmul_(_product(queries, before), reading[..., None])
    if D is not None:
        y.addcmul_(D.to(dtype).view(groups, 1, 1, -1, 1), x)
    return unfold(y, tokens).flatten(2, 3).to(out_dtype), state


def _within_chunks(
    scores: Tensor, x: Tensor, dt: Tensor, log_decay: Tensor, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything that decays inside chunks.

    Args:
        scores: `[B, G, n, C, C]`, shared by the heads of a group.
        x: `[B, G, n, C, h, P]`.
        dt, log_decay: dt and g, `[B, G, n, C, h]`.
        packing: sequences that must not meet.

    Returns:
        y `[B, G, n, C, h, P]`, Σ_{j<=i} scores_ij exp(g_{j+1} + ... + g_i) dt_j x_j;
        reading `[B, G, n, C, h]`, the decay from the chunk's start;
        writing `[B, G, n, C, h]`, dt times the decay to the chunk's end;
        Σ g `[B, G, n, h]`.
    """
    if packing is not None:
        scores = scores.masked_fill(~packing.same, 0)
    leading, chunk = scores.shape[:3], scores.shape[-1]
    mild = mild_block(log_decay)
    size = max(mild, min(BLOCK_BY_HEAD, chunk))
    inside = _mild_blocks if mild == size else _blocks_by_head
    blocks = (u.reshape(-1, size, *u.shape[4:]) for u in (x, dt, log_decay))
    scores, x = scores.flatten(0, 2), x.flatten(0, 2)
    y, reading, writing, total = inside(_diagonal_blocks(scores, size), *blocks)
    while size < chunk:
        # From halves to wholes: the second half reads, from the border between them, what the first wrote up to there.
        r1, r2 = halves(reading)
        w1, w2 = halves(writing)
        t1, t2 = halves(total)
        crossing = _product(_diagonal_blocks(scores, 2 * size)[:, size:, :size], x.reshape(-1, 2, size, *x.shape[2:])[:, 0], w1)
        y = y.unflatten(0, (-1, 2))
        y[:, 1].addcmul_(crossing, r2[..., None])
        y = y.flatten(1, 2)
        reading = torch.cat([r1, r2 * t1.exp()[:, None]], 1)
        writing = torch.cat([w1 * t2.exp()[:, None], w2], 1)
        total = t1 + t2
        size *= 2
    y, reading, writing, total = (u.unflatten(0, leading) for u in (y, reading, writing, total))
    if packing is not None:
        reading, writing = reading.masked_fill(~packing.reads[..., None], 0), writing.masked_fill(~packing.writes[..., None], 0)
    return y, reading, writing, total


def _mild_blocks(scores: Tensor, x: Tensor, dt: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_within_chunks` of blocks whose halves decay by at most MILD nats: all decays from the middle, one product for all heads."""
    since_start = log_decay.cumsum(1)
    middle, total = since_start[:, log_decay.shape[1] // 2 - 1], since_start[:, -1]
    from_middle = since_start - middle[:, None]
    reading, writing = from_middle.exp(), dt * (-from_middle).exp()
    y = _product(scores.tril(), x, writing) * reading[..., None]
    return y, reading * middle.exp()[:, None], writing * (total - middle).exp()[:, None], total


def _blocks_by_head(scores: Tensor, x: Tensor, dt: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_within_chunks` of blocks with any decays: a matrix of decays for every head."""
    log_decay, dt = log_decay.mT, dt.mT
    sums = segment_sums(log_decay)
    decays = sums.exp()
    y = (scores.unsqueeze(1) * decays * dt.unsqueeze(2)) @ x.transpose(1, 2)
    since_start = sums[..., 0] + log_decay[..., :1]
    return y.transpose(1, 2).contiguous(), since_start.exp().mT, (dt * decays[..., -1, :]).mT, since_start[..., -1]


def _product(matrix: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """matrix @ (weights · x), heads side by side: `[..., i, j]`, `[..., j, h, P]` and `[..., j, h]` to `[..., i, h, P]`."""
    weighted = x if weights is None else x * weights[..., None]
    return (matrix @ weighted.flatten(-2)).unflatten(-1, x.shape[-2:])


def _diagonal_blocks(scores: Tensor, size: int) -> Tensor:
    """Square blocks along the diagonal, `[X, C, C]` to `[X · C/size, size, size]`."""
    if size == scores.shape[-1]:
        return scores
    count = scores.shape[-1] // size
    return scores.view(-1, count, size, count, size).diagonal(0, 1, 3).movedim(-1, 1).flatten(0, 1)


def segment_sums(log_decay: Tensor) -> Tensor:
    """Σ_{j < s <= i} log_decay_s at `[..., i, j]` for j <= i, -inf above: `[..., C]` to `[..., C, C]`.

    Every column is summed from its own start: differences of longer sums would lose digits, and turn -inf into NaN.
    """
    chunk = log_decay.shape[-1]
    sums = log_decay[..., None].expand(*log_decay.shape, chunk).tril(-1).cumsum(-2)
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=log_decay.device).triu(1)
    return sums.masked_fill(above, -torch.inf)
