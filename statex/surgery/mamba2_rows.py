"""Where B and C, the keys and queries of Mamba-2, lie in the tensors of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.description import LayerDescription
from .operator import Context

PROJECTION, PROJECTION_BIAS = "mixer.in_proj.weight", "mixer.in_proj.bias"
CONV, CONV_BIAS = "mixer.conv1d.weight", "mixer.conv1d.bias"
NAMES = (PROJECTION, PROJECTION_BIAS, CONV, CONV_BIAS)
"""The tensors whose first dimension runs over B and C, among others."""


def split_rows(name: str, tensor: Tensor, layer: LayerDescription) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What lies before B, B, C, and what lies behind, as views.

    in_proj's rows are [z, x, B, C, dt]; the convolution's channels [x, B, C].
    """
    inner, state = layer.value_heads * layer.value_dim, layer.key_heads * layer.key_dim
    before = 2 * inner if name in (PROJECTION, PROJECTION_BIAS) else inner
    before_b, b, c, behind_c = tensor.split([before, state, state, tensor.shape[0] - before - 2 * state])
    return before_b, b, c, behind_c


def redraw(name: str, old: Tensor, layer: LayerDescription, target: LayerDescription, context: Context) -> Tensor:
    """The tensor with B and C of `target`'s size drawn by the family's init, and everything else as in `layer`."""
    before, *_, behind = split_rows(name, old, layer)
    rows = old.shape[0] + 2 * layer.key_heads * (target.key_dim - layer.key_dim)
    _, b, c, _ = split_rows(name, context.draw(name, (rows, *old.shape[1:])).to(old.dtype), target)
    return torch.cat([before, b, c, behind])
