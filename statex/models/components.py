"""What families share: a mixer's interface, how tokens lie in a batch, norms, the short convolution, the gated MLP."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..families.description import LayerDescription, ModelDescription
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

    def of_the_same_sequence(self, delayed: Tensor, lag: int) -> Tensor:
        """`[B, T, C]` that hold at t what was at t - lag, with 0 where that belongs to another packed sequence."""
        if self.cu_seqlens is None:
            return delayed
        if self._since_start is None:
            positions = torch.arange(delayed.shape[1], device=delayed.device)
            starts = self.cu_seqlens.to(delayed.device).long()
            self._since_start = positions - starts[torch.bucketize(positions, starts[1:], right=True)]
        return delayed.masked_fill((self._since_start < lag)[:, None], 0)


class Mixer(nn.Module, ABC):
    """What the backbone asks of a family's mixer, which is built from the model's and its layer's description and nothing else."""

    keep_in_fp32: ClassVar[tuple[str, ...]]
    """Parameters and submodules that stay fp32 in a half-precision model: errors in a decay compound over the sequence."""

    backend = "auto"
    """Kernels to run, a key of `statex.kernels.BACKENDS` or `auto`."""

    @abstractmethod
    def __init__(self, model: ModelDescription, layer: LayerDescription) -> None:
        super().__init__()

    @abstractmethod
    def reset_own_parameters(self) -> None:
        """Set the parameters that are no Linear, norm or convolution, so that what surgery adds has no effect."""

    @abstractmethod
    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        """`[B, T, hidden] -> [B, T, hidden]`; reads `state` and leaves in it what the layer remembers after the last token."""


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
    """x / rms(x) · weight over the last dimension, computed in fp32 or in x's higher precision, returned in the weight's dtype."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(self.weight.dtype)


class GroupedRMSNorm(nn.Module):
    """RMS norm within each of `groups` equal groups of channels, computed and returned in fp32 (fp64 for fp64 input).

    The weight has one number per channel, or per channel of a group and then all groups share it; None: no weight.
    """

    def __init__(self, channels: int, groups: int, eps: float, weight_channels: int | None) -> None:
        super().__init__()
        self.group_channels = channels // groups
        self.eps = eps
        self.weight = None if weight_channels is None else nn.Parameter(torch.ones(weight_channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., channels] -> [..., channels]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        grouped = x.to(wide).unflatten(-1, (-1, self.group_channels))
        normed = F.rms_norm(grouped, (self.group_channels,), eps=self.eps)
        if self.weight is not None:
            normed = normed * self.weight.to(wide).view(-1, self.group_channels)
        return normed.flatten(-2)


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

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None, name: str = "conv") -> Tensor:
        """`[B, T, C] -> [B, T, C]`. Padded positions of `x` count as zeros. Reads and replaces `state.conv[name]`."""
        x = layout.zero_padding(x)
        past = None if state is None else state.conv.get(name)
        history, length = self.width - 1, x.shape[1]
        inputs = F.pad(x, (0, 0, history, 0)) if past is None else torch.cat([past.transpose(1, 2).to(x.dtype), x], dim=1)
        if state is not None:
            state.conv[name] = detached_tail(inputs.transpose(1, 2), history)
        # A product and a sum a tap: for a few taps faster than a depthwise Conv1d, which wants channels first.
        taps = self.weight[:, 0].t().to(x.dtype)
        mixed = inputs[:, history:] * taps[history]
        if self.bias is not None:
            mixed = mixed + self.bias.to(x.dtype)
        for lag in range(1, history + 1):
            delayed = layout.of_the_same_sequence(inputs[:, history - lag :][:, :length], lag)
            mixed = torch.addcmul(mixed, delayed, taps[history - lag])
        return F.silu(mixed) if self.activate else mixed


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), "SwiGLU" with act = SiLU (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden] -> [..., hidden]`."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
