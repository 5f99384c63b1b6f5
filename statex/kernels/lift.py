"""Parameter-free features that lengthen keys and queries, and with them the state."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensors

FLOOR = 1e-4
"""Added to the mean square under the root, so that a zero key has zero features and finite gradients."""


def lift(x: Tensor, factor: int) -> Tensor:
    """The appended features of keys or queries: `psi_r(x) = x * roll(x, r) / rms(x)` for r = 1 .. factor-1, side by side.

    Inner products of such features add terms of (q·k)², so a longer state can tell apart keys that overlap (after DPFP,
    arXiv 2102.11174).

    Args:
        x: `[..., K]`.
        factor: parts of the lifted key, the plain one included; at least 2.

    Returns:
        `[..., (factor - 1) * K]` in the dtype of `x`.

    Raises:
        ValueError: `x` is not of real floating point, or `factor` is below 2, or above K, where rolls would repeat.
    """
    check_tensors(x=x)
    if not 2 <= factor <= x.shape[-1]:
        raise ValueError(f"lift factor must lie in 2..{x.shape[-1]} (the key's channels), got {factor}")
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + FLOOR)
    return torch.cat([normed * wide.roll(r, -1) for r in range(1, factor)], -1).to(x.dtype)


def lift_factor(lift_gamma: Tensor | None, key_dim: int) -> int:
    """Number of parts of a lifted key, read off `lift_gamma`'s shape `[..., (factor - 1) * key_dim]`."""
    return 1 if lift_gamma is None else 1 + lift_gamma.shape[-1] // key_dim


def lifted_key(k: Tensor, factor: int) -> Tensor:
    """`[k ; psi(k)]`, `[..., factor * K]`."""
    return k if factor == 1 else torch.cat([k, lift(k, factor)], -1)


def lifted_query(q: Tensor, lift_gamma: Tensor | None) -> Tensor:
    """`[q ; gamma * psi(q)]`, `[..., factor * K]`; `lift_gamma` broadcasts against `[..., (factor - 1) * K]`."""
    if lift_gamma is None:
        return q
    return torch.cat([q, lift_gamma * lift(q, lift_factor(lift_gamma, q.shape[-1]))], -1)


def channel_mixing(mixing: Tensor, factor: int, key_dim: int) -> Tensor:
    """Mixing as one number per state channel and value block, `[H, factor * K, f]`.

    `mixing` is `[H, f, f]` (one number per key block) or `[H, K, f]`. Lifted channels take the number of the channel that they
    stand for. A square mixing with f = K is the same in both readings.
    """
    if mixing.shape[1] != key_dim:
        mixing = mixing.repeat_interleave(key_dim // mixing.shape[1], 1)
    return mixing.repeat(1, factor, 1)
