"""Merging the heads of gated linear attention (GLA, HGRN2), and what every family's merge shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..families.description import LayerDescription, Mixing
from .lazy import LazyTensor
from .operator import Context, Options, Tensors, require_factor

MIXING, NORM, RHO = "mixer.mixing", "mixer.g_norm.weight", "mixer.spectrum_rho"
QUERY_ROWS = ("mixer.q_proj.weight", "mixer.q_conv1d.weight", "mixer.q_conv1d.bias")
"""Tensors whose first dimension runs over (query head, key channel)."""
OUTPUT_ROWS, OUTPUT_COLUMNS = "mixer.g_proj.weight", "mixer.o_proj.weight"
"""Tensors whose first, or second, dimension runs over (query head, value channel)."""


@dataclass(frozen=True)
class MergeHeadsOptions(Options):
    """Options of merge_heads."""

    factor: int | None = field(
        default=None, metadata={"help": "key/value heads merged into one; all heads of the layer when left out"}
    )
    mixing: Mixing = field(
        default="channel",
        metadata={
            "help": "channel: a new number per key channel and value block, f·K a head; "
            "scalar: one per pair of source heads, f² a head, with cheaper scores",
            "only": "preserve",
        },
    )


Merge = Callable[[LayerDescription, Tensors, MergeHeadsOptions, Context], tuple[LayerDescription, dict[str, LazyTensor]]]
"""How one family merges heads; as `Operator.apply`."""


def merge_linear_attention(norm_per_head: bool) -> Merge:
    """The merge of a family with S_t = Diag(a_t) S_{t-1} + k_t^T v_t.

    Args:
        norm_per_head: the output norm averages over each head (GLA), whose merge by `inherit` then repeats its weight; or over all
            channels (HGRN2), and then no merge touches it.
    """

    def merge(
        layer: LayerDescription, tensors: Tensors, options: MergeHeadsOptions, context: Context
    ) -> tuple[LayerDescription, dict[str, LazyTensor]]:
        """Merge each `factor` consecutive key/value heads.

        Key/value head m·f+i becomes block i of head m. With g query heads to a key/value head, queries regroup (m, i, g) ->
        (m, g, i): query head (m, g) of the result reads with the g-th query of every source head, so that merged heads never share
        equal keys.
        """
        factor = require_factor(options, context)
        merged = merged_sizes(layer, factor)
        stock = merged.replace(scale=merged.key_dim**-0.5, norm_groups=merged.query_heads if norm_per_head else layer.norm_groups)
        if options.init == "reinit":
            return redraw_mixer(stock.replace(blocks=1, mixing=None), tensors, context)
        result = _regroup_queries(layer, factor, tensors)
        if options.init == "inherit":
            if norm_per_head and NORM in result:
                norm = result[NORM]
                result[NORM] = norm.then(lambda weight: weight.repeat(factor), shape=(norm.shape[0] * factor,))
            return stock, result
        merged = merged.replace(blocks=layer.blocks * factor, mixing=options.mixing)  # scale and norm stay the source's
        result[MIXING] = mixing_tensor(merged, layer, result.get(MIXING))
        if RHO in result:  # a number per source head, which is a block now
            shape = (merged.key_heads, merged.blocks)
            result[RHO] = result[RHO].then(lambda rho: rho.reshape(shape), shape=shape, status="rest")
        return merged, result

    return merge


def merged_sizes(layer: LayerDescription, factor: int) -> LayerDescription:
    """The layer with `factor` times fewer and larger heads, all else as it was."""
    return layer.replace(
        query_heads=layer.query_heads // factor,
        key_heads=layer.key_heads // factor,
        value_heads=layer.value_heads // factor,
        key_dim=layer.key_dim * factor,
        value_dim=layer.value_dim * factor,
    )


def redraw_mixer(layer: LayerDescription, tensors: Tensors, context: Context) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """`layer`, and its tensors with the whole mixer and the norm in front of it drawn by the family's inits."""
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("mixer")}
    for spec in context.family.layer_tensors:
        if spec.name.startswith("mixer") and spec.present(context.model, layer):
            result[spec.name] = context.fresh(spec.name, tensors[spec.name], spec.shape(context.model, layer))
    return layer, result


def _regroup_queries(layer: LayerDescription, factor: int, tensors: Tensors) -> dict[str, LazyTensor]:
    """All tensors, those that run over query heads permuted (m, i, g) -> (m, g, i)."""
    result = dict(tensors)
    queries = layer.query_heads // layer.key_heads
    if queries == 1:
        return result

    def regroup(tensor: Tensor, channels: int) -> Tensor:
        split = tensor.reshape(layer.key_heads // factor, factor, queries, channels, *tensor.shape[1:])
        return split.transpose(1, 2).reshape(tensor.shape)

    for name in QUERY_ROWS:
        if name in result:
            result[name] = result[name].then(lambda rows: regroup(rows, layer.key_dim), status="rest")
    if OUTPUT_ROWS in result:
        result[OUTPUT_ROWS] = result[OUTPUT_ROWS].then(lambda rows: regroup(rows, layer.value_dim), status="rest")
    result[OUTPUT_COLUMNS] = result[OUTPUT_COLUMNS].then(
        lambda weight: regroup(weight.T, layer.value_dim).T.contiguous(), status="rest"
    )
    return result


def mixing_tensor(merged: LayerDescription, layer: LayerDescription, old: LazyTensor | None, *values: int) -> LazyTensor:
    """M that joins each source head with itself only: `[key_heads, blocks or key_dim, blocks, *values]`, fp32.

    The identity, or, where the source heads had mixing matrices of their own (`old`), their block diagonal.

    Args:
        merged, layer: the layer after and before.
        values: one more dimension where several values share a key.
    """
    factor = layer.key_heads // merged.key_heads
    channels = layer.key_dim if merged.mixing == "channel" else layer.blocks

    def make() -> Tensor:
        mixing = torch.ones(layer.key_heads, 1, 1, *values) if old is None else old.load().float()
        mixing = mixing.repeat_interleave(channels // mixing.shape[1], dim=1)
        diagonal = torch.zeros(merged.key_heads, factor, channels, factor, layer.blocks, *values)
        for part in range(factor):
            diagonal[:, part, :, part] = mixing.view(merged.key_heads, factor, channels, layer.blocks, *values)[:, part]
        return diagonal.view(merged.key_heads, factor * channels, merged.blocks, *values)

    return LazyTensor((merged.key_heads, factor * channels, merged.blocks, *values), torch.float32, make, status="new")
