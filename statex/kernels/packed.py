"""Packed sequences that start from states of their own, or whose final states are wanted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def run_in_buckets(
    run: Callable[[tuple[Tensor, ...], Tensor | None], tuple[Tensor, Tensor | None]],
    rows: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Runs sequences of like length as one padded batch, so that calls grow with the logarithm of the lengths.

    Zeros after a sequence's end leave its state as it is (keys 0, log-decays 0), so a padded batch has the right final states.

    Args:
        run: computes padded rows `[N', L, ...]` from states `[N', ...]` or None; returns outputs and final states.
        rows: tensors `[1, T, ...]`.
        initial_state: `[N, ...]` or None.
        cu_seqlens: `[N + 1]`.

    Returns:
        Outputs `[1, T, ...]` and final states `[N, ...]`.
    """
    lengths = cu_seqlens.diff().tolist()
    starts = cu_seqlens[:-1].tolist()
    buckets: dict[int, list[int]] = {}
    for n, length in enumerate(lengths):
        buckets.setdefault(length.bit_length(), []).append(n)
    device = rows[0].device
    outputs, positions, states, order = [], [], [], []
    for members in buckets.values():
        longest = max(1, *(lengths[n] for n in members))  # an empty sequence keeps its state
        offsets = torch.arange(longest, device=device)
        ends = torch.tensor([lengths[n] for n in members], device=device)
        inside = offsets < ends[:, None]
        index = torch.tensor([starts[n] for n in members], device=device)[:, None] + offsets
        gathered = (x[0, index.clamp(max=x.shape[1] - 1)] for x in rows)
        padded = tuple(x.masked_fill(~inside[(...,) + (None,) * (x.dim() - 2)], 0) for x in gathered)
        state = None if initial_state is None else initial_state[torch.tensor(members, device=device)]
        output, final = run(padded, state)
        assert final is not None
        outputs.append(output[inside])
        positions.append(index[inside])
        states.append(final)
        order += members
    back = torch.cat(positions).argsort()
    return torch.cat(outputs)[back][None], torch.cat(states)[torch.tensor(order, device=device).argsort()]
