"""How each family gives its keys and queries, B and C of a state space model, new rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..families.description import LayerDescription
from . import gla_rows, mamba2_rows, mamba_rows
from .lazy import LazyTensor
from .operator import Context, Options, Tensors

DT_BIAS, A_LOG, NORM = "mixer.dt_bias", "mixer.A_log", "mixer.norm.weight"


@dataclass(frozen=True)
class WidenStateOptions(Options):
    """Options of widen_state."""

    factor: int | None = field(
        default=None, metadata={"help": "how many times longer keys become (Mamba: d_state); 4 when left out"}
    )
    zero: Literal["B", "C"] = field(
        default="C",
        metadata={
            "help": "which of the two starts at zero in the new rows, B, the keys, or C, the queries; the other is drawn, so that "
            "there is always a gradient",
            "only": "preserve",
        },
    )
    new_decays: Literal["repeat", "continue"] = field(
        default="repeat",
        metadata={
            "help": "Mamba: the rates A of the new part of the state; repeat: those of the old part again, slow ones included; "
            "continue: n+1, on from where S4D-real's 1, 2, ... ended",
            "family": "mamba",
        },
    )
    reinit_decay: bool = field(
        default=False,
        metadata={
            "help": "Mamba-2: also reset A_log and the gated norm to the family's init and dt_bias to 1, as the paper's "
            "released code does; heads then forget within a token",
            "only": "reinit",
            "family": "mamba2",
        },
    )


Widened = tuple[LayerDescription, dict[str, LazyTensor]]
"""A wider layer and all its tensors."""
Widen = Callable[[LayerDescription, LayerDescription, Tensors, WidenStateOptions, Context], Widened]
"""(layer, the same with longer keys, its tensors, options, context) -> the layer and all its tensors."""


def widen_mamba2(
    layer: LayerDescription, wide: LayerDescription, tensors: Tensors, options: WidenStateOptions, context: Context
) -> Widened:
    """Every group of B and C gets its new rows at the end of that group, in `in_proj` and in the convolution."""
    grown = 2 * layer.key_heads * (wide.key_dim - layer.key_dim)
    result = dict(tensors)
    for name in mamba2_rows.NAMES:
        if name in tensors:
            rows, *rest = tensors[name].shape
            change = partial(_widen_rows, name=name, layer=layer, wide=wide, options=options, context=context)
            result[name] = tensors[name].then(change, shape=(rows + grown, *rest))
    if options.reinit_decay:
        ones = tensors[DT_BIAS]
        result[DT_BIAS] = ones.replaced(lambda: torch.ones(ones.shape, dtype=ones.dtype), ones.shape)
        for name in (A_LOG, NORM):
            result[name] = context.fresh(name, tensors[name], tensors[name].shape)
    return wide, result


def _widen_rows(
    old: Tensor, *, name: str, layer: LayerDescription, wide: LayerDescription, options: WidenStateOptions, context: Context
) -> Tensor:
    """One of the tensors that run over B and C, `[rows, ...]`, with its new rows, in its own dtype."""
    if options.init == "reinit":
        return mamba2_rows.redraw(name, old, layer, wide, context)
    before, b, c, behind = mamba2_rows.split_rows(name, old, layer)
    grow = partial(_grow, name=name, heads=layer.key_heads, layer=layer, wide=wide, options=options, context=context)
    return torch.cat([before, grow(b, "B"), grow(c, "C"), behind])


def _grow(
    rows: Tensor,
    side: str,
    *,
    name: str,
    heads: int,
    layer: LayerDescription,
    wide: LayerDescription,
    options: WidenStateOptions,
    context: Context,
) -> Tensor:
    """Rows of keys (side `B`) or queries (`C`), `[heads * channels, ...]`, each head's new ones behind its old ones."""
    rows = rows.unflatten(0, (heads, -1))
    new = torch.cat([rows] * (wide.key_dim // layer.key_dim - 1), dim=1)
    if options.init == "preserve" and not name.endswith("conv1d.weight"):  # taps are copied on both sides
        if side == options.zero:  # with its biases: silu(bias) is not zero
            new = torch.zeros_like(new)
        elif name.endswith("weight"):  # drawn, since equal rows get equal gradients and never part
            std = rows.float().flatten(1).std(dim=1).view(heads, 1, 1)
            source = context.generator(name, f"{side} {layer.key_dim}:{wide.key_dim}")
            new = (torch.randn(new.shape, generator=source) * std).to(new.dtype)
    return torch.cat([rows, new], dim=1).flatten(0, 1)


def widen_mamba(
    layer: LayerDescription, wide: LayerDescription, tensors: Tensors, options: WidenStateOptions, context: Context
) -> Widened:
    """B and C get new rows in `x_proj`, and A, which knows each of them, new columns."""

    def projection(old: Tensor) -> Tensor:
        if options.init == "reinit":
            return mamba_rows.redraw(old, layer, wide, context)
        before, b, c = mamba_rows.split_rows(old, layer)
        name: str = mamba_rows.PROJECTION
        grow = partial(_grow, name=name, heads=layer.key_heads, layer=layer, wide=wide, options=options, context=context)
        return torch.cat([before, grow(b, "B"), grow(c, "C")])

    def decays(old: Tensor) -> Tensor:
        if options.new_decays == "repeat":
            return old.repeat(1, wide.key_dim // layer.key_dim)
        rates = torch.arange(layer.key_dim + 1, wide.key_dim + 1).log().to(old.dtype)
        return torch.cat([old, rates.expand(old.shape[0], -1)], dim=1)

    rows, channels = tensors[mamba_rows.PROJECTION].shape
    shape = (rows + 2 * (wide.key_dim - layer.key_dim), channels)
    return wide, dict(tensors) | {
        mamba_rows.PROJECTION: tensors[mamba_rows.PROJECTION].then(projection, shape=shape),
        A_LOG: tensors[A_LOG].then(decays, shape=(channels, wide.key_dim)),
    }


def widen_gla(
    layer: LayerDescription, wide: LayerDescription, tensors: Tensors, options: WidenStateOptions, context: Context
) -> Widened:
    """Every head, a merged one in each of its blocks, gets longer keys and queries. A new channel decays as an old one does."""
    factor = wide.key_dim // layer.key_dim
    if options.init != "preserve":
        wide = wide.replace(scale=(wide.key_dim / wide.blocks) ** -0.5)
    result = dict(tensors)
    for name in (*gla_rows.QUERIES, *gla_rows.KEYS, *gla_rows.DECAYS):
        if name not in tensors:
            continue
        rows, *rest = tensors[name].shape
        shape, heads = (rows * factor, *rest), gla_rows.source_heads(name, layer)
        if name in gla_rows.DECAYS:
            result[name] = tensors[name].then(partial(_repeat, heads=heads, factor=factor), shape=shape)
        elif options.init == "reinit":
            result[name] = context.fresh(name, tensors[name], shape)
        else:
            side = "C" if name in gla_rows.QUERIES else "B"
            grow = partial(_grow, name=name, heads=heads, layer=layer, wide=wide, options=options, context=context)
            result[name] = tensors[name].then(partial(grow, side=side), shape=shape)
    if layer.mixing == "channel":
        heads, channels, blocks = tensors[gla_rows.MIXING].shape
        repeat = partial(_repeat, heads=layer.blocks, factor=factor)
        result[gla_rows.MIXING] = tensors[gla_rows.MIXING].then(
            lambda mixing: repeat(mixing.transpose(0, 1)).transpose(0, 1).contiguous(), shape=(heads, channels * factor, blocks)
        )
    return wide, result


def _repeat(rows: Tensor, *, heads: int, factor: int) -> Tensor:
    """Rows `[heads * channels, ...]`, those of each head `factor` times."""
    return torch.cat([rows.unflatten(0, (heads, -1))] * factor, dim=1).flatten(0, 1)
