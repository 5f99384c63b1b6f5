"""One token of generation: the state is read and written once, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_gla_step, check_ssd_step
from .lift import channel_mixing, lift_factor, lifted_key, lifted_query
from .signed import extended
from .triton_backend import step_kernel


@torch.no_grad()
def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float,
    mixing: Tensor | None = None,
    lift_gamma: Tensor | None = None,
    spectrum: Tensor | None = None,
) -> Tensor:
    """One token of `statex.kernels.gla`. No gradients.

    Args:
        q: `[B, Hq, K]`, Hq a multiple of H.
        k, log_decay: `[B, H, K]`.
        v: `[B, H, V]`.
        state: `[B, H, factor * K, V]`, float32 (or float64); updated in place.
        scale, mixing, lift_gamma, spectrum: as in `gla`.

    Returns:
        `[B, Hq, V]` in the dtype of `q`.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 but for the batch, shapes or devices that disagree.
    """
    check_gla_step(q, k, v, log_decay, state, mixing, lift_gamma, spectrum)
    if (kernel := step_kernel(state)) is not None:
        decay = log_decay if spectrum is None else extended(log_decay.float(), spectrum.float())
        return kernel.gla_step(q, k, v, decay, state, logarithm=spectrum is None, scale=scale, mixing=mixing, lift_gamma=lift_gamma)
    dtype, (_, heads, key_dim) = state.dtype, k.shape
    factor = lift_factor(lift_gamma, key_dim)
    decay = _decay(log_decay.to(dtype), spectrum).repeat(1, 1, factor)
    keys = lifted_key(k.to(dtype), factor)
    queries = scale * lifted_query(q.to(dtype), None if lift_gamma is None else lift_gamma.to(dtype))
    queries = queries.unflatten(1, (heads, -1))
    state.mul_(decay[..., None]).addcmul_(keys[..., None], v.to(dtype)[:, :, None, :])
    if mixing is None:
        return (queries @ state).flatten(1, 2).to(q.dtype)
    gains = channel_mixing(mixing.to(dtype), factor, key_dim)
    read = torch.einsum("bhgk,hkj,bhkjv->bhgjv", queries, gains, state.unflatten(-1, (mixing.shape[-1], -1)))
    return read.flatten(3).flatten(1, 2).to(q.dtype)


@torch.no_grad()
def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    lift_gamma: Tensor | None = None,
    spectrum: Tensor | None = None,
) -> Tensor:
    """One token of `statex.kernels.ssd`. No gradients.

    Args:
        x: `[B, H, P]`.
        dt: `[B, H]`, after softplus.
        A, D: `[H]`.
        B, C: `[B, G, N]`.
        state: `[B, H, factor * N, P]`, float32 (or float64); updated in place.
        lift_gamma, spectrum: as in `ssd`.

    Returns:
        `[B, H, P]` in the dtype of `x`.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 but for the batch, shapes or devices that disagree.
    """
    check_ssd_step(x, dt, A, B, C, state, D, lift_gamma, spectrum)
    if (kernel := step_kernel(state)) is not None:
        decay = A if spectrum is None else extended(dt.float() * A.float(), spectrum.float())
        return kernel.ssd_step(x, dt, decay, B, C, state, logarithm=spectrum is None, D=D, lift_gamma=lift_gamma)
    dtype = state.dtype
    values, steps = x.to(dtype), dt.to(dtype)
    groups, d_state = B.shape[1:]
    keys = lifted_key(B.to(dtype), lift_factor(lift_gamma, d_state))
    queries = lifted_query(C.to(dtype), None if lift_gamma is None else lift_gamma.to(dtype))
    state.mul_(_decay(steps * A.to(dtype), spectrum)[..., None, None])
    by_group = state.unflatten(1, (groups, -1))
    by_group.addcmul_(keys[:, :, None, :, None], (steps[..., None] * values).unflatten(1, (groups, -1))[:, :, :, None, :])
    y = (queries[:, :, None, None, :] @ by_group).squeeze(-2).flatten(1, 2)
    if D is not None:
        y = y + D.to(dtype)[:, None] * values
    return y.to(x.dtype)


def _decay(log_decay: Tensor, spectrum: Tensor | None) -> Tensor:
    return log_decay.exp() if spectrum is None else extended(log_decay, spectrum.to(log_decay.dtype))
