"""Mamba-2's state space model by chunks, in PyTorch (the SSD algorithm of arXiv 2405.21060).

B and C are shared by the heads of a group and never copied per head: their product is formed once per group, and decays and dt go
on x. Sums of log-decays are built up from halves, without differences of longer sums, so no digits cancel however strong the decay.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .chunking import Packing, carry, chunk_length, fold, mild_block, run_segments, unfold
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
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results of `statex.kernels.ssd`, but packed sequences start from zero states and return none."""
    batch, tokens, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    state_dim = d_state * lift_factor(lift_gamma, d_state)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    chunk = chunk_length(tokens, state_dim, heads // groups * head_dim)
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, state_dim, head_dim, dtype=dtype)
    state = initial_state.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3)
    per_group = 4 * state_dim + heads // groups * (4 * head_dim + 4 * chunk + 2 * state_dim * head_dim // chunk)
    y, state = run_segments(
        partial(_segment, chunk=chunk, dtype=dtype),
        (x, dt, B, C),
        (A, D, lift_gamma),
        state,
        chunk=chunk,
        elements_per_token=batch * groups * per_group,
        cu_seqlens=cu_seqlens,
    )
    return y, state.transpose(2, 3).flatten(1, 2).contiguous() if output_final_state else None


def _segment(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
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
    dt = dt.to(dtype)
    x, dt, log_decay = (fold(u.unflatten(2, (groups, -1)), chunk, dtype) for u in (x, dt, dt * A.to(dtype)))
    keys, queries = fold(B, chunk, dtype), fold(C, chunk, dtype)
    if lift_gamma is not None:
        gamma = lift_gamma.to(dtype)[:, None, None]
        keys, queries = lifted_key(keys, lift_factor(lift_gamma, keys.shape[-1])), lifted_query(queries, gamma)
    y, since_start, until_end = _within_chunks(queries @ keys.mT, x, dt, log_decay, packing)
    total = since_start[..., -1, :]
    if packing is not None:
        since_start = since_start.masked_fill(~packing.reads[..., None], -torch.inf)
        until_end = until_end.masked_fill(~packing.writes[..., None], -torch.inf)
        total = total.masked_fill(~packing.passes[:, None], -torch.inf)
    updates = _product(keys.mT, x, dt * until_end.exp())
    before, state = carry(updates, total[..., None, :, None], state)
    # In place: on a CPU, touching fresh memory costs more than the arithmetic.
    y.addcmul_(_product(queries, before), since_start.exp()[..., None])
    if D is not None:
        y.addcmul_(D.to(dtype).view(groups, 1, 1, -1, 1), x)
    return unfold(y, tokens).flatten(2, 3).to(out_dtype), state


def _within_chunks(
    scores: Tensor, x: Tensor, dt: Tensor, log_decay: Tensor, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y_i = Σ_{j<=i} scores_ij exp(g_{j+1} + ... + g_i) dt_j x_j, per chunk.

    Args:
        scores: `[..., C, C]`, shared by the heads.
        x: `[..., C, h, P]`.
        dt, log_decay: dt and g, `[..., C, h]`.
        packing: sequences whose tokens must not meet.

    Returns:
        y `[..., C, h, P]`, Σ_{s<=i} g_s and Σ_{s>i} g_s, both `[..., C, h]`.
    """
    if packing is not None:
        scores = scores.masked_fill(~packing.same, 0)
    leading, chunk, leading_dims = scores.shape[:-2], scores.shape[-1], scores.dim() - 1
    mild = mild_block(log_decay)
    size = max(mild, min(BLOCK_BY_HEAD, chunk))
    scores = scores.flatten(0, -3)
    inside = _mild_blocks if mild == size else _blocks_by_head
    blocks = (u.reshape(-1, size, *u.shape[leading_dims:]) for u in (x, dt, log_decay))
    y, since_start, until_end = inside(_diagonal_blocks(scores, size), *blocks)
    while size < chunk:
        # From halves to wholes: queries of a second half meet keys of the first, with decays that run from the border between them.
        a1, a2 = since_start.unflatten(0, (-1, 2)).unbind(1)
        b1, b2 = until_end.unflatten(0, (-1, 2)).unbind(1)
        crossing = _diagonal_blocks(scores, 2 * size)[:, size:, :size]
        x1, dt1 = (u.reshape(-1, 2, size, *u.shape[leading_dims:])[:, 0] for u in (x, dt))
        y = y.unflatten(0, (-1, 2))
        y[:, 1].addcmul_(_product(crossing, x1, dt1 * b1.exp()), a2.exp()[..., None])
        y = y.flatten(1, 2)
        since_start, until_end = torch.cat([a1, a2 + a1[:, -1:]], 1), torch.cat([b1 + a2[:, -1:], b2], 1)
        size *= 2
    return y.unflatten(0, leading), since_start.unflatten(0, leading), until_end.unflatten(0, leading)


def _mild_blocks(scores: Tensor, x: Tensor, dt: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_within_chunks` of blocks whose halves decay by at most MILD nats: all decays from the middle, one product for all heads."""
    since_start = log_decay.cumsum(1)
    from_middle = since_start - since_start[:, log_decay.shape[1] // 2 - 1, None]
    y = _product(scores.tril(), x, dt * (-from_middle).exp()) * from_middle.exp()[..., None]
    return y, since_start, since_start[:, -1:] - since_start


def _blocks_by_head(scores: Tensor, x: Tensor, dt: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_within_chunks` of blocks with any decays: a matrix of decays for every head."""
    log_decay = log_decay.mT
    sums = segment_sums(log_decay)
    y = (scores.unsqueeze(1) * sums.exp() * dt.mT.unsqueeze(2)) @ x.transpose(1, 2)
    return y.transpose(1, 2).contiguous(), (sums[..., 0] + log_decay[..., :1]).mT, sums[..., -1, :].mT


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
    """Σ_{j < s <= i} log_decay_s at `[..., i, j]` for j <= i, -inf above: `[..., C]` to `[..., C, C]`, C a power of two."""
    chunk = log_decay.shape[-1]
    sums, size = torch.zeros_like(log_decay)[..., None, None], 1
    while size < chunk:
        first, second = sums.unflatten(-3, (-1, 2)).unbind(-3)
        entering = second[..., :1] + log_decay[..., size :: 2 * size, None, None]
        lower = torch.cat([first[..., -1:, :] + entering, second], -1)
        upper = torch.nn.functional.pad(first, (0, size), value=-torch.inf)
        sums, size = torch.cat([upper, lower], -2), 2 * size
    return sums.squeeze(-3)
