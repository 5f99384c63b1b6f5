"""What families share: a mixer's interface, how tokens lie in a batch, norms, the short convolution, the gated MLP."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..families.description import LayerDescription, ModelDescription
from ..kernels.pointwise import gated_product, norm, residual_norm, short_convolution_parts, short_convolution_step
from .cache import LayerState, detached_tail


class TokenLayout:
    """Which tokens of a batch are padding, and where packed sequences begin.

    Args:
        mask: `[B, T]`, 0 at padded positions; None when there are none. Padding must change no state.
        cu_seqlens: `[N + 1]` borders of the sequences packed into one row, from 0 to T; states and convolutions restart at each.
    """

    def __init__(self, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> None:
        self.padded = None if mask is None else mask.eq(0)[..., None]
        self.cu_seqlens = cu_seqlens
        self._since_start: Tensor | None = None

    def zero_padding(self, x: Tensor) -> Tensor:
        """Set `[B, T, C]` to 0 at padded positions."""
        return x if self.padded is None else x.masked_fill(self.padded, 0)

    def since_start(self, tokens: int, device: torch.device) -> Tensor | None:
        """`[T]`, tokens since the start of each token's packed sequence; None where rows are single sequences."""
        if self.cu_seqlens is not None and self._since_start is None:
            positions = torch.arange(tokens, device=device)
            starts = self.cu_seqlens.to(device).long()
            self._since_start = positions - starts[torch.bucketize(positions, starts[1:], right=True)]
        return self._since_start


class Mixer(nn.Module, ABC):
    """What the backbone asks of a family's mixer, which is built from the model's and its layer's description and nothing else."""

    keep_in_fp32: ClassVar[tuple[str, ...]]
    """Parameters and submodules that stay fp32 in a half-precision model: errors in a decay compound over the sequence."""

    backend = "auto"
    """Kernels that the recurrence takes, a key of `statex.kernels.BACKENDS` or `auto`."""

    @abstractmethod
    def __init__(self, model: ModelDescription, layer: LayerDescription) -> None:
        super().__init__()

    @abstractmethod
    def reset_own_parameters(self) -> None:
        """Set the parameters that are no Linear, norm or convolution, so that what surgery adds has no effect."""

    @abstractmethod
    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        """`[B, T, hidden] -> [B, T, hidden]`; reads `state` and leaves in it what the layer remembers after the last token."""


def wide_input(x: Tensor, layer: nn.Module) -> Tensor:
    """x as a layer takes it that computes gates: in fp32 or more, as its weights are kept, unless they were cast with the model."""
    given = (parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())  # quantised ones do not say
    return x.to(next(given, torch.promote_types(x.dtype, torch.float32)))


def spectrum(layer: LayerDescription, rho: Tensor | None, *shape: int, device: torch.device) -> Tensor | None:
    """How far the eigenvalues of a layer's steps reach below 0, as kernels take it; None where they do not.

    Args:
        rho: the layer's `spectrum_rho`, whose numbers stand for equally many of the last dimension's channels each; tanh(ρ).
        shape: `[heads, key_dim]`, or `[heads]` where a head has one decay.
    """
    if layer.spectrum is None:
        return None
    if rho is None:
        return torch.ones(shape, device=device)
    return torch.tanh(rho).repeat_interleave(shape[-1] // rho.shape[-1], -1)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in fp32 or in x's higher precision.

    The result has the dtype in which the layers behind it compute: autocast's where it is on, else the weight's.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, eps=self.eps, dtype=self._dtype(x))

    def _dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype


class ResidualRMSNorm(RMSNorm):
    """The norm in front of a part of a block, which also adds what the part before it gave to the residual stream."""

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x + update, or x itself, and the norm of that."""
        return residual_norm(x, update, self.weight, eps=self.eps, dtype=self._dtype(x))


class GroupedRMSNorm(nn.Module):
    """RMS norm within each of `groups` equal groups of channels, with a gate behind or in front of it, computed in fp32 or more.

    The weight has one number per channel, or per channel of a group and then all groups share it; None: no weight.

    Args:
        activation: of the gate; None: it comes activated.
        gate_first: norm(x · act(gate)) instead of norm(x) · act(gate).
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        eps: float,
        weight_channels: int | None,
        activation: str | None = None,
        gate_first: bool = False,
    ) -> None:
        super().__init__()
        self.groups, self.eps, self.activation, self.gate_first = groups, eps, activation, gate_first
        self.weight = None if weight_channels is None else nn.Parameter(torch.ones(weight_channels))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """`[..., channels] -> [..., channels]` in x's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return norm(
                x, self.weight, eps=self.eps, groups=self.groups, gate=gate, activation=self.activation, gate_first=self.gate_first
            )


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over a few tokens, then SiLU. Never looks over the start of a packed sequence.

    Args:
        activate: False leaves the SiLU out.
    """

    def __init__(self, channels: int, width: int, bias: bool, activate: bool = True) -> None:
        super().__init__()
        self.activate = activate
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch does for a Conv1d, with a zero bias."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            init.zeros_(self.bias)

    @property
    def width(self) -> int:
        """Number of taps."""
        return self.weight.shape[-1]

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        state: LayerState | None = None,
        name: str = "conv",
        sizes: tuple[int, ...] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """`[B, T, C] -> [B, T, C]`, or cut into parts of `sizes` channels. Padded positions of `x` count as zeros.

        Reads `state.conv[name]` and moves it on.
        """
        x = layout.zero_padding(x)
        activation, taps = "silu" if self.activate else None, self.weight[:, 0]
        past = None if state is None else state.conv.get(name)
        # The step writes into the state, which autograd could not undo.
        if past is not None and x.shape[1] == 1 and past.dtype == x.dtype and not torch.is_grad_enabled():
            token = short_convolution_step(x[:, 0], past, taps, self.bias, activation)[:, None]
            return token if sizes is None else token.split(sizes, -1)
        history, since_start = self.width - 1, layout.since_start(x.shape[1], x.device)
        inputs = x if past is None else torch.cat([past.transpose(1, 2).to(x.dtype), x], dim=1)
        if state is not None:
            recent = F.pad(inputs, (0, 0, max(0, history - inputs.shape[1]), 0))
            state.conv[name] = detached_tail(recent.transpose(1, 2), history)
        parts = short_convolution_parts(inputs, taps, self.bias, sizes or (len(taps),), since_start, activation)
        if past is not None:
            parts = tuple(part[:, history:] for part in parts)
        return parts[0] if sizes is None else parts


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), "SwiGLU" with act = SiLU (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden] -> [..., hidden]`."""
        return self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x), self.activation))
