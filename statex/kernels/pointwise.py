"""What surrounds a recurrence in a layer: norms, gates, decays, time steps, the short convolution. One pass each on a GPU.

In PyTorch these took more of a training step than the recurrences: every cast, product and sum of a gated norm reads and writes all
channels of all tokens. `fused.pointwise`, `fused.decay_gate` and `fused.convolution` do the same in Triton, and are taken on CUDA
devices for float32, bfloat16 and float16, whatever backend the recurrence takes.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from . import triton_backend
from .checks import (
    check_convolution,
    check_convolution_step,
    check_gated_product,
    check_low_rank,
    check_norm,
    check_residual_norm,
    check_time_steps,
)

ALIASES = {None: "identity", "swish": "silu"}
"""Names by which the kernels know an activation that has several."""

FUSED = ("identity", "silu", "sigmoid")
"""Activations that the Triton kernels know."""


def norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    groups: int = 1,
    gate: Tensor | None = None,
    activation: str | None = "silu",
    gate_first: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """RMS norm within each of `groups` equal groups of channels, weighted, and gated; computed in float32 or x's higher precision.

    Args:
        x: `[..., channels]`.
        weight: one number per channel, or per channel of a group and then all groups share it; None: no weight.
        gate: like x; None: no gate.
        activation: of the gate, a name that transformers knows; None: the gate comes activated.
        gate_first: norm(x · act(gate)) · weight instead of norm(x) · weight · act(gate).
        dtype: of the result; by default x's.

    Raises:
        ValueError: dtypes that are not real floating point, shapes or devices that disagree.
    """
    check_norm(x, weight, gate, groups)
    dtype = x.dtype if dtype is None else dtype
    name = ALIASES.get(activation, activation)
    kernels = _kernels(name, x, weight, gate)
    if kernels is not None and x.shape[-1] // groups <= kernels.LONGEST_ROW:
        normed: Tensor = kernels.norm(x, weight, gate, groups=groups, eps=eps, activation=name, gate_first=gate_first, dtype=dtype)
        return normed
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = None if gate is None else _activated(gate.to(wide), name)
    rows = x.to(wide)
    if factor is not None and gate_first:
        rows = rows * factor
    rows = rows.unflatten(-1, (groups, -1))
    rows = F.rms_norm(rows, rows.shape[-1:], eps=eps)
    if weight is not None:
        rows = rows * weight.to(wide).view(-1, rows.shape[-1])
    rows = rows.flatten(-2)
    if factor is not None and not gate_first:
        rows = rows * factor
    return rows.to(dtype)


def residual_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What a pre-norm block does between two of its parts: x + update, and the weighted RMS norm of that sum.

    Both come from one pass over memory on a GPU, and so do both gradients of x, by the norm and past it.

    Args:
        x: `[..., channels]`, the residual stream.
        update: like x, in any dtype, what the part before adds; None: x is normed, and returned, as it is.
        weight: `[channels]`.
        dtype: of the norm; by default x's.

    Returns:
        the sum, in the wider dtype of both, and its norm.

    Raises:
        ValueError: dtypes that are not real floating point, shapes or devices that disagree.
    """
    check_residual_norm(x, update, weight)
    dtype = x.dtype if dtype is None else dtype
    kernels = _kernels("identity", x, update, weight)
    if kernels is not None and x.shape[-1] <= kernels.LONGEST_ROW:
        both: tuple[Tensor, Tensor] = kernels.residual_norm(x, update, weight, eps=eps, dtype=dtype)
        return both
    total = x if update is None else x + update
    return total, norm(total, weight, eps=eps, dtype=dtype)


def gated_product(gate: Tensor, up: Tensor, activation: str | None) -> Tensor:
    """act(gate) · up, both `[..., channels]`; the heart of a gated MLP (arXiv 2002.05202). Computed as `norm` is, in up's dtype.

    Raises `ValueError` on dtypes that are not real floating point, and on shapes or devices that disagree.
    """
    check_gated_product(gate, up)
    name = ALIASES.get(activation, activation)
    kernels = _kernels(name, up, gate)
    if kernels is not None:
        product: Tensor = kernels.gated_product(gate, up, name)
        return product
    wide = torch.promote_types(up.dtype, torch.float32)
    return (_activated(gate.to(wide), name) * up.to(wide)).to(up.dtype)


def time_steps(x: Tensor, bias: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    """softplus(x + bias) within [low, high], how Mamba-2 and Gated DeltaNet make the step of a token (arXiv 2405.21060).

    Args:
        x: `[..., heads]`.
        bias: `[heads]`.
        high: None: no bound.

    Returns:
        like x, in float32 or x's higher precision.

    Raises:
        ValueError: dtypes that are not real floating point, shapes or devices that disagree.
    """
    check_time_steps(x, bias)
    if (kernels := _kernels("identity", x, bias)) is not None:
        steps: Tensor = kernels.time_steps(x, bias, low, math.inf if high is None else high)
        return steps
    steps = F.softplus(x.to(torch.promote_types(x.dtype, torch.float32)) + bias)
    return steps if low <= 0 and high is None else steps.clamp(low, high)


def short_convolution(
    x: Tensor, taps: Tensor, bias: Tensor | None, since_start: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Causal depthwise convolution over a few tokens.

    Args:
        x: `[B, T, channels]`; zeros are before the first token.
        taps: `[channels, width]`, the last for a token itself.
        bias: `[channels]`, or None.
        since_start: `[T]`, tokens since the start of each token's packed sequence, over which nothing looks; None for one sequence.
        activation: of the result, or None.

    Returns:
        `[B, T, channels]` in x's dtype.

    Raises:
        ValueError: dtypes that are not real floating point, shapes or devices that disagree.
    """
    return short_convolution_parts(x, taps, bias, (x.shape[-1],), since_start, activation)[0]


def short_convolution_parts(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    since_start: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """`short_convolution` cut into parts, whose gradients nothing has to join in the backward pass on a GPU.

    Args:
        sizes: channels of each part.
        x, taps, bias, since_start, activation: as there.

    Returns:
        `[B, T, size]` for each part.

    Raises:
        ValueError: dtypes that are not real floating point, shapes or devices that disagree, sizes that do not add up.
    """
    check_convolution(x, taps, bias, since_start, sizes)
    name = ALIASES.get(activation, activation)
    width, tokens = taps.shape[1], x.shape[1]
    kernels = _kernels(name, x, taps, bias, module="convolution")
    if kernels is not None and width <= kernels.MOST_TAPS:
        convolved: tuple[Tensor, ...] = kernels.short_convolution(x, taps, bias, since_start, name, sizes)
        return convolved
    # A product and a sum a tap: for a few taps faster than a depthwise Conv1d, which wants channels first.
    inputs = F.pad(x, (0, 0, width - 1, 0))
    taps = taps.t().to(x.dtype)
    mixed = x * taps[width - 1]
    if bias is not None:
        mixed = mixed + bias.to(x.dtype)
    for lag in range(1, width):
        delayed = inputs[:, width - 1 - lag :][:, :tokens]
        if since_start is not None:
            delayed = delayed.masked_fill((since_start < lag)[:, None], 0)
        mixed = torch.addcmul(mixed, delayed, taps[width - 1 - lag])
    return _activated(mixed, name).split(sizes, -1)


@torch.no_grad()
def short_convolution_step(x: Tensor, state: Tensor, taps: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """One token of `short_convolution`. No gradients.

    Args:
        x: `[B, channels]`.
        state: `[B, channels, width - 1]`, the tokens before it, the oldest first, in x's dtype; moved on by x in place.
        taps, bias, activation: as there.

    Returns:
        `[B, channels]` in x's dtype.

    Raises:
        ValueError: dtypes that are not real floating point, shapes, devices or dtypes that disagree.
    """
    check_convolution_step(x, state, taps, bias)
    name, width = ALIASES.get(activation, activation), taps.shape[1]
    kernels = _kernels(name, x, taps, bias, state, module="convolution")
    if kernels is not None and width <= kernels.MOST_TAPS:
        convolved: Tensor = kernels.short_convolution_step(x, state, taps, bias, name)
        return convolved
    inputs = torch.cat([state, x[..., None]], -1)
    state.copy_(inputs[..., 1:])
    mixed = (inputs * taps.to(x.dtype)).sum(-1)
    return _activated(mixed if bias is None else mixed + bias.to(x.dtype), name)


def low_rank_log_decay(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor, *, normalizer: float, least: float | None = None
) -> Tensor:
    """Log-decays logsigmoid(up · (down · x) + bias) / normalizer in nats, as in gated linear attention (arXiv 2312.06635).

    Computed in float32 or x's higher precision, whatever autocast says: x is not rounded, nor are the weights.

    Args:
        x: `[..., hidden]`.
        down: `[rank, hidden]`.
        up: `[channels, rank]`.
        bias: `[channels]`.
        least: bound below which no log-decay falls; None: there is none.

    Returns:
        `[..., channels]`, float32 or x's higher precision.

    Raises:
        ValueError: dtypes that are not real floating point, shapes or devices that disagree.
    """
    check_low_rank(x, down, up, bias)
    with torch.autocast(x.device.type, enabled=False):
        kernels = _kernels("identity", x, down, up, bias, module="decay_gate")
        if kernels is not None and len(down) <= kernels.MOST_RANK:
            decays: Tensor = kernels.low_rank_log_decay(x, down, up, bias, normalizer=normalizer, least=least)
            return decays
        wide = torch.promote_types(x.dtype, torch.float32)
        inner = F.linear(x.to(wide), down.to(wide))
        return log_decay(F.linear(inner, up.to(wide), bias.to(wide)), normalizer=normalizer, least=least)


def log_decay(gates: Tensor, *, normalizer: float, least: float | None = None) -> Tensor:
    """logsigmoid(gates) / normalizer, at least `least`: the last steps of `low_rank_log_decay`."""
    decays = F.logsigmoid(gates) / normalizer
    return decays if least is None else decays.clamp_min(least)


def _kernels(activation: str | None, *tensors: Tensor | None, module: str = "pointwise") -> ModuleType | None:
    """The Triton kernels, where they take such tensors, none of them empty. What is compiled is fused by the compiler."""
    given = [x for x in tensors if x is not None]
    if torch.compiler.is_compiling() or not all(x.is_cuda and x.dtype != torch.float64 and x.numel() for x in given):
        return None
    return triton_backend.MODULES.get(module) if activation in FUSED else None


def _activated(x: Tensor, activation: str | None) -> Tensor:
    if activation == "identity":
        return x
    activate = F.silu if activation == "silu" else ACT2FN[activation]
    activated: Tensor = activate(x)
    return activated
