"""widen_state: Mamba-2's d_state becomes f times as large, by new rows for B and C (docs/surgery.md, "widen_state").

Reinit and inherit are StateX's (arXiv 2509.22630); preserve is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...families.description import LayerDescription
from ..lazy import LazyTensor
from ..mamba2_rows import CONV, NAMES, PROJECTION, redraw, split_rows
from ..operator import Context, Operator, Options, Tensors, require_factor

DT_BIAS, A_LOG, NORM = "mixer.dt_bias", "mixer.A_log", "mixer.norm.weight"


@dataclass(frozen=True)
class WidenStateOptions(Options):
    """Options of widen_state."""

    factor: int | None = field(default=None, metadata={"help": "how many times larger d_state becomes; 4 when left out"})
    zero: Literal["B", "C"] = field(
        default="C",
        metadata={
            "help": "which of the two starts at zero in the new rows; the other is drawn, so that there is always a gradient",
            "only": "preserve",
        },
    )
    reinit_decay: bool = field(
        default=False,
        metadata={
            "help": "also reset A_log and the gated norm to the family's init and dt_bias to 1, as the paper's "
            "released code does; heads then forget within a token",
            "only": "reinit",
        },
    )


def check(layer: LayerDescription, options: WidenStateOptions, context: Context) -> None:
    """Raise `PlanError` where the layer cannot be widened as asked."""
    require_factor(options, context)
    if layer.lift > 1:
        raise context.error(
            f"its keys are lifted ×{layer.lift}: a wider key has other products, and the function would change",
            "widen the unlifted checkpoint, then lift; one plan may hold both",
        )


def apply(
    layer: LayerDescription, tensors: Tensors, options: WidenStateOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Give every group of B and C (factor - 1)·d_state new rows, at the end of that group."""
    factor = require_factor(options, context)
    wide = layer.replace(key_dim=layer.key_dim * factor)
    grown = 2 * layer.key_heads * (wide.key_dim - layer.key_dim)
    result = dict(tensors)
    for name in NAMES:
        if name in tensors:
            rows, *rest = tensors[name].shape
            change = partial(_widen, name=name, layer=layer, wide=wide, options=options, context=context)
            result[name] = tensors[name].then(change, shape=(rows + grown, *rest))
    if options.reinit_decay:
        ones = tensors[DT_BIAS]
        result[DT_BIAS] = ones.replaced(lambda: torch.ones(ones.shape, dtype=ones.dtype), ones.shape)
        for name in (A_LOG, NORM):
            result[name] = context.fresh(name, tensors[name], tensors[name].shape)
    return wide, result


def _widen(
    old: Tensor, *, name: str, layer: LayerDescription, wide: LayerDescription, options: WidenStateOptions, context: Context
) -> Tensor:
    """One of the tensors that run over B and C, `[rows, ...]`, with its new rows, in its own dtype."""
    if options.init == "reinit":
        return redraw(name, old, layer, wide, context)
    groups, added = layer.key_heads, wide.key_dim - layer.key_dim

    def grow(rows: Tensor, side: str) -> Tensor:
        rows = rows.reshape(groups, layer.key_dim, *rows.shape[1:])
        new = torch.cat([rows] * (added // layer.key_dim), dim=1)
        if options.init == "preserve" and name != CONV:
            if side == options.zero:  # with its biases: silu(bias) is not zero
                new = torch.zeros_like(new)
            elif name == PROJECTION:  # drawn, since equal rows get equal gradients and never part
                std = rows.float().flatten(1).std(dim=1).view(groups, 1, 1)
                source = context.generator(name, f"{side} {layer.key_dim}:{wide.key_dim}")
                new = (torch.randn(new.shape, generator=source) * std).to(new.dtype)
        return torch.cat([rows, new], dim=1).flatten(0, 1)

    before, b, c, behind = split_rows(name, old, layer)
    return torch.cat([before, grow(b, "B"), grow(c, "C"), behind])


OPERATOR = Operator(
    name="widen_state",
    summary="gives B and C new rows, so that d_state is f times as large",
    stage=20,
    options=WidenStateOptions,
    default_factor=lambda layer: 4,
    default_layers="all",
    check=check,
    apply=apply,
)
