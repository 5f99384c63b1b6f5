"""Merging the heads of the delta rule (docs/surgery.md, "merge_heads").

A step of the delta rule takes out what its key holds, so heads that shared one state would take out each other's values. `preserve`
therefore gives every value head a longer state of its own, under keys that mix those of all heads.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..families.description import LayerDescription
from .lazy import LazyTensor
from .merging import MIXING, MergeHeadsOptions, merged_sizes, mixing_tensor, redraw_mixer
from .operator import Context, Tensors, require_factor

BETA, NORM = "mixer.b_proj.weight", "mixer.o_norm.weight"


def merge_delta_net(
    layer: LayerDescription, tensors: Tensors, options: MergeHeadsOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Merge each `factor` consecutive heads; other inits than `preserve` merge values too, under one beta for the group."""
    factor = require_factor(options, context)
    if options.init == "preserve":
        return _preserve(layer, tensors, options)
    merged = merged_sizes(layer, factor)
    merged = merged.replace(scale=merged.key_dim**-0.5, norm_groups=merged.value_heads)
    if options.init == "reinit":
        return redraw_mixer(_stock(merged), tensors, context)
    result, norm = dict(tensors), tensors[NORM]
    result[NORM] = norm.then(lambda weight: weight.repeat(factor), shape=(norm.shape[0] * factor,))
    if BETA in result:
        rows, channels = result[BETA].shape
        result[BETA] = result[BETA].then(partial(_average, factor=factor), shape=(rows // factor, channels))
    return merged, result


def merge_gated_deltanet(
    layer: LayerDescription, tensors: Tensors, options: MergeHeadsOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Merge each `factor` consecutive key heads. Values, betas and decays keep their heads, so `inherit` changes no tensor."""
    if options.init == "preserve":
        return _preserve(layer, tensors, options)
    merged = _merged_keys(layer, require_factor(options, context))
    merged = merged.replace(scale=merged.key_dim**-0.5)
    if options.init == "reinit":
        return redraw_mixer(_stock(merged), tensors, context)
    return merged, dict(tensors)


def _preserve(
    layer: LayerDescription, tensors: Tensors, options: MergeHeadsOptions
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Value heads, scale and norm stay the source's; M, which mixes the keys, is new."""
    assert options.factor is not None
    merged = _merged_keys(layer, options.factor).replace(blocks=layer.blocks * options.factor, mixing=options.mixing)
    values = layer.value_heads // (layer.key_heads * layer.blocks)
    return merged, dict(tensors) | {MIXING: mixing_tensor(merged, layer, tensors.get(MIXING), values)}


def _merged_keys(layer: LayerDescription, factor: int) -> LayerDescription:
    """The layer with `factor` times fewer and longer keys and queries, all else as it was."""
    return layer.replace(
        query_heads=layer.query_heads // factor, key_heads=layer.key_heads // factor, key_dim=layer.key_dim * factor
    )


def _stock(layer: LayerDescription) -> LayerDescription:
    return layer.replace(blocks=1, mixing=None)


def _average(rows: Tensor, factor: int) -> Tensor:
    """The mean of each `factor` consecutive rows, in their dtype."""
    return rows.float().unflatten(0, (-1, factor)).mean(1).to(rows.dtype)
