"""Decays below 0, for kernels that know only logarithms of decays: products of signs telescope.

With s, how far the spectrum reaches below 0, a decay a becomes a' = (1+s)·a - s (arXiv 2411.12537: s = 1). Let σ_t be the sign
of a'_1 ··· a'_t. The product of a' over u < r <= t has the sign σ_t σ_u, so a recurrence with decays |a'| computes the same when
keys (or values) are multiplied by σ_u when they are written, and queries (or outputs) by σ_t when they read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunking import sequence_ids
from .lift import channel_mixing, lift_factor, lifted_key, lifted_query

FLOOR = 1e-7
"""Least |a'|: its logarithm must exist. In float32 a number near 1 does not notice the difference; a smaller floor would let the
gradient of the logarithm, up to 1/FLOOR, raise rounding errors to where they can be seen."""

Kernel = Callable[..., tuple[Tensor, Tensor | None]]


def extended(log_decay: Tensor, spectrum: Tensor) -> Tensor:
    """a' itself, `(1 + spectrum) · exp(log_decay) - spectrum`, with |a'| >= FLOOR and its exact gradient; 0 counts as positive."""
    decay = _unfloored(log_decay, spectrum)
    return decay + (_floored(decay) - decay).detach()


def signed_log(log_decay: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """log|a'|, at most 0, and where a' is negative.

    The floor acts in the forward only. The gradient is that of the logarithm at the floored a', so that, times the decay in the
    kernel, the gradient of a' comes out as it is without logarithms.

    Args:
        log_decay: nats, at most 0; -inf allowed.
        spectrum: in [-1, 1], broadcasting against it.
    """
    decay = _unfloored(log_decay, spectrum)
    with torch.no_grad():
        below = (1 + spectrum) * torch.expm1(log_decay)
        # log1p on both sides: slow decays, of either sign, keep their digits.
        near_one = torch.where(below > -1, below, -2 - below).clamp_min(FLOOR - 1)
        log = torch.log1p(near_one)
    if decay.requires_grad:
        log = log + (decay - decay.detach()) / _floored(decay.detach())
    return log, decay.detach() < 0


def gla(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    spectrum: Tensor,
    mixing: Tensor | None,
    lift_gamma: Tensor | None,
    cu_seqlens: Tensor | None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """`statex.kernels.gla` with a spectrum `[H, K]`, by a `kernel` that has none."""
    key_dim, group, dtype = k.shape[-1], q.shape[2] // k.shape[2], _wide(q)
    factor = lift_factor(lift_gamma, key_dim)
    log_decay, negative = signed_log(log_decay.to(dtype), spectrum.to(dtype))
    out_dtype = q.dtype
    if lift_gamma is not None:
        # The products of a lifted key are taken of its own channels, before any sign.
        q, k, v = lifted_query(q.to(dtype), lift_gamma.to(dtype)), lifted_key(k.to(dtype), factor), v.to(dtype)
        log_decay, negative = log_decay.repeat(1, 1, 1, factor), negative.repeat(1, 1, 1, factor)
        mixing = None if mixing is None else channel_mixing(mixing, factor, key_dim)
    running, final = signs(negative, cu_seqlens)
    read = running if group == 1 else running.repeat_interleave(group, 2)
    o, state = kernel(q * read, k * running, v, log_decay, mixing=mixing, lift_gamma=None, cu_seqlens=cu_seqlens, **options)
    return o.to(out_dtype), None if state is None else state * final[..., None]


def ssd(
    kernel: Kernel,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    spectrum: Tensor,
    cu_seqlens: Tensor | None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """`statex.kernels.ssd` with a spectrum `[H]`, by a `kernel` that takes `log_decay` in place of dt · A.

    A head has one decay, so its values and outputs carry the signs; the skip connection, signed twice, carries none.
    """
    dtype = _wide(x)
    log_decay, negative = signed_log(dt.to(dtype) * A.to(dtype), spectrum.to(dtype))
    running, final = signs(negative, cu_seqlens)
    running = running[..., None]
    y, state = kernel(x * running, dt, A, B, C, log_decay=log_decay, cu_seqlens=cu_seqlens, **options)
    return y * running, None if state is None else state * final[..., None, None]


def signs(negative: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """σ of every token, and after the last one, as integers.

    Args:
        negative: where a' is below 0, `[B, T, ...]`.
        cu_seqlens: borders of sequences packed into one row; σ starts at 1 in each.

    Returns:
        `[B, T, ...]`, and `[N, ...]`, 1 for an empty sequence.
    """
    flips = negative.cumsum(1, dtype=torch.int32)
    if cu_seqlens is None:
        return _sign(flips), _sign(flips[:, -1])
    borders = cu_seqlens.to(flips.device).long()
    before = torch.cat([torch.zeros_like(flips[0, :1]), flips[0]])[borders]
    since_start = flips[0] - before[sequence_ids(borders, flips.shape[1])]
    return _sign(since_start)[None], _sign(before.diff(dim=0))


def _sign(flips: Tensor) -> Tensor:
    return 1 - 2 * (flips & 1)


def _unfloored(log_decay: Tensor, spectrum: Tensor) -> Tensor:
    return 1 + (1 + spectrum) * torch.expm1(log_decay)


def _floored(decay: Tensor) -> Tensor:
    return torch.where(decay.abs() < FLOOR, torch.where(decay < 0, -FLOOR, FLOOR), decay)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
