"""A linear recurrence without matrices, h_t = a_t h_{t-1} + u_t for every element by itself, as autograd sees it once.

Long runs go in two levels: all stretches of about sqrt(T) steps at once from zero, then their ends, then what each stretch was
handed. Decays are multiplied and never divided by, so any decay will do, below 0 too, and nothing overflows.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 32
"""Runs up to this length go step by step."""

WORTH_A_STEP = {"cpu": 1 << 11, "other": 1 << 21}
"""Elements from which on a step outweighs its launch, so that runs of any length go step by step, which touches memory least."""


def linear_scan(decay: Tensor, updates: Tensor, initial: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + updates_t.

    Args:
        decay, updates: `[B, T, ...]`, alike in shape and dtype.
        initial: `[B, ...]`, h_0.

    Returns:
        h `[B, T, ...]`.
    """
    scanned: Tensor = _LinearScan.apply(decay, updates, initial)
    return scanned


class _LinearScan(torch.autograd.Function):
    """The gradient of a scan is a scan backwards in time; only decays and results are kept for it."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, updates: Tensor, initial: Tensor) -> Tensor:
        states = _scan(decay, updates, initial)
        ctx.save_for_backward(decay, states, initial)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, initial = ctx.saved_tensors
        # dh_t = gradient_t + decay_{t+1} dh_{t+1}: the same recurrence, from the last token to the first.
        following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1).flip(1)
        reached = linear_scan(following, gradient.flip(1), torch.zeros_like(initial)).flip(1)
        before = torch.cat([initial[:, None], states[:, :-1]], 1)
        return reached * before, reached, reached[:, 0] * decay[:, 0]


def _scan(decay: Tensor, updates: Tensor, initial: Tensor) -> Tensor:
    tokens, compiling = updates.shape[1], torch.compiler.is_compiling()
    worth = WORTH_A_STEP.get(updates.device.type, WORTH_A_STEP["other"])
    if tokens <= STEPS or (initial.numel() >= worth and not compiling):
        return _functional_steps(decay, updates, initial) if compiling else _steps(decay, updates, initial)
    width = isqrt(tokens - 1) + 1
    padding = -tokens % width
    if padding:
        nothing = (0, 0) * (updates.dim() - 2) + (0, padding)
        decay, updates = F.pad(decay, nothing, value=1.0), F.pad(updates, nothing)
    decay, updates = (x.unflatten(1, (-1, width)).transpose(0, 1).flatten(0, 1) for x in (decay, updates))
    stretches = decay.shape[0] // initial.shape[0]
    states = _scan(decay, updates, torch.zeros_like(updates[:, 0]))
    product = decay.cumprod(1)
    by_stretch = (stretches, initial.shape[0])
    totals, ends = (x[:, -1].unflatten(0, by_stretch).transpose(0, 1) for x in (product, states))
    handed = _scan(totals.contiguous(), ends.contiguous(), initial)
    handed = torch.cat([initial[:, None], handed[:, :-1]], 1).transpose(0, 1).flatten(0, 1)
    states = torch.addcmul(states, product, handed[:, None])
    return states.unflatten(0, by_stretch).transpose(0, 1).flatten(1, 2)[:, :tokens]


def _steps(decay: Tensor, updates: Tensor, initial: Tensor) -> Tensor:
    states, state = torch.empty_like(updates), initial
    for t in range(updates.shape[1]):
        state = torch.addcmul(updates[:, t], decay[:, t], state, out=states[:, t])
    return states


def _functional_steps(decay: Tensor, updates: Tensor, initial: Tensor) -> Tensor:
    """For the compiler, which knows no writing into part of a tensor, and makes one kernel of these steps."""
    states, state = [], initial
    for factor, update in zip(decay.unbind(1), updates.unbind(1), strict=True):
        state = torch.addcmul(update, factor, state)
        states.append(state)
    return torch.stack(states, 1)
