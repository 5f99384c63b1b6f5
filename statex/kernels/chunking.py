"""What the chunked forms share: cutting time into chunks and segments, carrying states from chunk to chunk, packed sequences.

A *chunk* is worked on at once by matrix products; a *segment* is a run of chunks whose intermediates fit a memory budget. Segments
follow one another and, when gradients are wanted, are computed again in the backward pass: between segments only states are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_SEQUENTIAL_CHUNKS = 32
"""Longer runs of chunks are carried in two levels of about sqrt(n) steps each: fewer launches on a GPU."""

MILD = 20.0
"""Nats over half a block up to which exp(+x) and exp(-x) may be multiplied: their rounding errors stay near 1e-6."""

CHUNKS = (64, 128)
"""Shortest and longest chunk."""

SEGMENT_ELEMENTS = {"cpu": 1 << 24, "other": 1 << 28}
"""Elements of intermediates in a segment: few enough for memory, enough that each operation outweighs its launch."""


@dataclass(frozen=True)
class Packing:
    """Which of a segment's tokens belong together, when several sequences share one row. `[chunks, C]` unless noted."""

    reads: Tensor
    """The token's sequence began before this chunk: it reads the carried state."""
    writes: Tensor
    """The token's sequence goes on at the chunk's end: it is part of the carried state."""
    passes: Tensor
    """`[chunks]`: one sequence spans the whole chunk, so the carried state survives it."""
    same: Tensor
    """`[chunks, C, C]`: both tokens are of one sequence."""


def chunk_length(tokens: int, key_dim: int, value_dim: int) -> int:
    """Tokens in a chunk, a power of two; `value_dim` counts all values that share a key.

    Work inside a chunk grows with its length, moving the state shrinks with it: they meet near K·V / (K + V).
    """
    balanced = key_dim * value_dim // (2 * (key_dim + value_dim))
    longest = min(max(_next_power_of_two(balanced), CHUNKS[0]), CHUNKS[1])
    return min(longest, _next_power_of_two(tokens))


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The number of the sequence that each token belongs to, `[T]`, without waiting for the device."""
    positions = torch.arange(tokens, device=cu_seqlens.device)
    return torch.bucketize(positions, cu_seqlens[1:], right=True)


def pack(ids: Tensor, previous: Tensor, chunk: int) -> Packing:
    """Masks of one segment from its tokens' sequence numbers `[T]` and the number of the token before it (`[1]`)."""
    padding = -ids.shape[0] % chunk
    ids = torch.cat([ids, ids[-1:].expand(padding)]).view(-1, chunk)
    last = ids[:, -1]
    before = torch.cat([previous, last[:-1]])
    return Packing(
        reads=ids == before[:, None], writes=ids == last[:, None], passes=last == before, same=ids[:, :, None] == ids[:, None, :]
    )


def mild_block(log_decay: Tensor) -> int:
    """The longest block (halving the chunk, `[..., C, D]`) over each half of which no channel decays by more than MILD nats.

    In such blocks one reference in the middle serves all pairs of tokens. Looking at the values waits for the device once, which
    costs far less than the dozens of launches it saves; compiled or captured code may not look and gets 1, which is always safe.
    """
    if torch.compiler.is_compiling() or (log_decay.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 1
    size, log_decay = log_decay.shape[-2], log_decay.detach()
    while size > 1:
        sums = log_decay.unflatten(-2, (-1, size // 2)).sum(-2)
        if bool(sums.amin() > -MILD):
            return size
        size //= 2
    return size


def fold(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`[B, T, H, ...]` to `[B, H, chunks, C, ...]`, zeros after the last token. Zeros leave states and outputs alone."""
    padding = -x.shape[1] % chunk
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return x.unflatten(1, (-1, chunk)).movedim(3, 1).to(dtype).contiguous()


def unfold(x: Tensor, tokens: int) -> Tensor:
    """Inverse of `fold`: `[B, H, chunks, C, ...]` to `[B, T, H, ...]`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :tokens]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second halves of blocks, which lie side by side in the first dimension."""
    first, second = x.unflatten(0, (-1, 2)).unbind(1)
    return first, second


def carry(updates: Tensor, log_decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """States in front of every chunk, S_{c+1} = exp(log_decay_c) S_c + updates_c.

    Args:
        updates: `[B, H, n, ...]`.
        log_decay: `[B, H, n, ...]`, at most 0, -inf allowed, broadcasting against `updates`.
        initial: `[B, H, ...]`.

    Returns:
        States in front of each chunk, `[B, H, n, ...]`, and the state after the last, `[B, H, ...]`.
    """
    chunks = updates.shape[2]
    if chunks > MAX_SEQUENTIAL_CHUNKS:
        return _carry_in_two_levels(updates, log_decay, initial)
    decay = log_decay.exp()
    if chunks == 1:
        return initial.unsqueeze(2), torch.addcmul(updates[:, :, 0], decay[:, :, 0], initial)
    if not torch.is_grad_enabled():
        before = torch.empty_like(updates)
        before[:, :, 0] = initial
        for c in range(chunks - 1):
            torch.addcmul(updates[:, :, c], decay[:, :, c], before[:, :, c], out=before[:, :, c + 1])
        return before, torch.addcmul(updates[:, :, -1], decay[:, :, -1], before[:, :, -1])
    states = [initial]
    for update, factor in zip(updates.unbind(2), decay.unbind(2), strict=True):
        states.append(torch.addcmul(update, factor, states[-1]))
    return torch.stack(states[:-1], 2), states[-1]


def _carry_in_two_levels(updates: Tensor, log_decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    heads, chunks = updates.shape[1:3]
    width = isqrt(chunks - 1) + 1
    padding = -chunks % width
    if padding:
        updates = F.pad(updates, (0, 0) * (updates.dim() - 3) + (0, padding))
        log_decay = F.pad(log_decay, (0, 0) * (log_decay.dim() - 3) + (0, padding))
    updates, log_decay = (x.unflatten(2, (-1, width)).flatten(1, 2) for x in (updates, log_decay))
    within, ends = carry(updates, log_decay, torch.zeros_like(updates[:, :, 0]))
    totals = log_decay.sum(2).unflatten(1, (heads, -1))
    starts, final = carry(ends.unflatten(1, (heads, -1)), totals, initial)
    # Sums of decays are never differences of longer sums: those lose digits, and turn -inf into NaN.
    since_start = torch.cat([torch.zeros_like(log_decay[:, :, :1]), log_decay[:, :, :-1]], 2).cumsum(2)
    states = torch.addcmul(within, since_start.exp(), starts.flatten(1, 2).unsqueeze(2))
    return states.unflatten(1, (heads, -1)).flatten(2, 3)[:, :, :chunks], final


def run_segments(
    segment: Callable[..., tuple[Tensor, Tensor]],
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor | None, ...],
    state: Tensor,
    *,
    chunk: int,
    elements_per_token: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs `segment(*rows, *shared, state, packing)` over time.

    Args:
        segment: returns its tokens' outputs `[B, t, ...]` and the state after them.
        rows: tensors `[B, T, ...]`, cut along time.
        shared: tensors handed whole to every segment.
        state: the state in front of the first token.
        chunk: tokens in a chunk; segments are multiples of it.
        elements_per_token: elements of intermediates that a segment makes per time step of the whole batch.
        cu_seqlens: borders of packed sequences, or None.

    Returns:
        Outputs `[B, T, ...]` and the last state.
    """
    tokens, device = rows[0].shape[1], rows[0].device
    budget = SEGMENT_ELEMENTS.get(device.type, SEGMENT_ELEMENTS["other"])
    length = max(1, budget // (elements_per_token * chunk)) * chunk
    ids = None if cu_seqlens is None else sequence_ids(cu_seqlens.to(device), tokens)
    tracked = (*rows, *shared, state)
    recompute = length < tokens and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tracked)
    outputs = []
    # `split`, not slices: the backward of each slice would fill a gradient as long as the whole row.
    for i, pieces in enumerate(zip(*(x.split(length, 1) for x in rows), strict=True)):
        start = i * length
        packing = None if ids is None else pack(ids[start : start + length], ids[max(start - 1, 0)][None], chunk)
        inputs = (*pieces, *shared, state, packing)
        if recompute:
            output, state = checkpoint(segment, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        else:
            output, state = segment(*inputs)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state
