"""merge_heads: f key/value heads of GLA become one, whose state is f times as large as theirs together (docs/surgery.md).

Reinit and inherit are StateX's (arXiv 2509.22630); preserve, with its mixing matrix, is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...families.description import LayerDescription, Mixing
from ..lazy import LazyTensor
from ..operator import Context, Operator, Options, Tensors, require_factor

MIXING, NORM = "mixer.mixing", "mixer.g_norm.weight"
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


def check(layer: LayerDescription, options: MergeHeadsOptions, context: Context) -> None:
    """Raise `PlanError` where the layer cannot be merged as asked."""
    if layer.key_heads == 1:
        raise context.error("it has one key/value head, so there is nothing to merge", "leave this layer out, or use lift_keys")
    factor = require_factor(options, context)
    if layer.key_heads % factor:
        divisors = [str(n) for n in range(2, layer.key_heads + 1) if layer.key_heads % n == 0]
        raise context.error(
            f"factor {factor} does not divide its {layer.key_heads} key/value heads", f"use {' or '.join(divisors)}"
        )
    if layer.lift > 1:
        raise context.error(
            f"its keys are lifted ×{layer.lift}: the products of a merged key would cross heads, and the function change",
            "merge the unlifted checkpoint, then lift; one plan may hold both",
        )
    if layer.mixing is not None and options.init == "inherit":
        raise context.error("a merge with init `inherit` cannot keep this layer's mixing matrix", "use preserve or reinit")
    if layer.mixing == "channel" and options.mixing == "scalar":
        raise context.error("its mixing is per channel already and cannot become scalar", "use channel")


def apply(
    layer: LayerDescription, tensors: Tensors, options: MergeHeadsOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Merge each `factor` consecutive key/value heads.

    Key/value head m·f+i becomes block i of head m. With g query heads to a key/value head, queries regroup (m, i, g) -> (m, g, i):
    query head (m, g) of the result reads with the g-th query of every source head, so that merged heads never share equal keys.
    """
    factor = require_factor(options, context)
    merged = layer.replace(
        query_heads=layer.query_heads // factor,
        key_heads=layer.key_heads // factor,
        value_heads=layer.value_heads // factor,
        key_dim=layer.key_dim * factor,
        value_dim=layer.value_dim * factor,
    )
    if options.init == "reinit":
        return _reinit(merged, tensors, context)
    result = _regroup_queries(layer, factor, tensors)
    if options.init == "inherit":
        if NORM in result:
            norm = result[NORM]
            result[NORM] = norm.then(lambda weight: weight.repeat(factor), shape=(norm.shape[0] * factor,))
        return merged.replace(scale=merged.key_dim**-0.5, norm_groups=merged.query_heads), result
    mixing = options.mixing
    merged = merged.replace(blocks=layer.blocks * factor, mixing=mixing)  # the scale and the norm stay the source's
    old = result.get(MIXING)
    rows = merged.blocks if mixing == "scalar" else merged.key_dim
    result[MIXING] = LazyTensor(
        (merged.key_heads, rows, merged.blocks),
        torch.float32,
        lambda: _mixing(merged, layer, factor, None if old is None else old.load()),
        status="new",
    )
    return merged, result


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


def _mixing(merged: LayerDescription, layer: LayerDescription, factor: int, old: Tensor | None) -> Tensor:
    """M that reads each source head with itself only: `[key_heads, blocks or key_dim, blocks]`, fp32.

    The identity, or, where the source heads had mixing matrices of their own, their block diagonal.
    """
    if old is None:
        old = torch.ones(layer.key_heads, 1, 1)
    if merged.mixing == "channel" and old.shape[1] != layer.key_dim:
        old = old.repeat_interleave(layer.key_dim // old.shape[1], dim=1)
    _, rows, blocks = old.shape
    diagonal = torch.zeros(merged.key_heads, factor, rows, factor, blocks)
    for part in range(factor):
        diagonal[:, part, :, part] = old.view(merged.key_heads, factor, rows, blocks)[:, part].float()
    return diagonal.view(merged.key_heads, factor * rows, factor * blocks)


def _reinit(merged: LayerDescription, tensors: Tensors, context: Context) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """The whole mixer and the norm in front of it drawn by the family's inits, as a stock layer with fewer heads."""
    merged = merged.replace(scale=merged.key_dim**-0.5, norm_groups=merged.query_heads, blocks=1, mixing=None)
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("mixer")}
    for spec in context.family.layer_tensors:
        if spec.name.startswith("mixer") and spec.present(context.model, merged):
            result[spec.name] = context.fresh(spec.name, tensors[spec.name], spec.shape(context.model, merged))
    return merged, result


OPERATOR = Operator(
    name="merge_heads",
    summary="merges key/value heads into one with a state f times as large",
    stage=20,
    options=MergeHeadsOptions,
    default_factor=lambda layer: layer.key_heads,
    default_layers="every:6",
    check=check,
    apply=apply,
)
