"""Where B and C, the key and the query of Mamba, lie in the tensors of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.description import LayerDescription
from .operator import Context

PROJECTION = "mixer.x_proj.weight"
"""The one tensor whose rows run over B and C, behind those that time steps come from: [dt, B, C]."""


def split_rows(tensor: Tensor, layer: LayerDescription) -> tuple[Tensor, Tensor, Tensor]:
    """Rows before B, those of B, and those of C, as views."""
    before, b, c = tensor.split([tensor.shape[0] - 2 * layer.key_dim, layer.key_dim, layer.key_dim])
    return before, b, c


def redraw(old: Tensor, layer: LayerDescription, target: LayerDescription, context: Context) -> Tensor:
    """The projection with B and C of `target`'s size drawn by the family's init, and the rest as in `layer`."""
    before, *_ = split_rows(old, layer)
    rows = before.shape[0] + 2 * target.key_dim
    _, b, c = split_rows(context.draw(PROJECTION, (rows, old.shape[1])).to(old.dtype), target)
    return torch.cat([before, b, c])
