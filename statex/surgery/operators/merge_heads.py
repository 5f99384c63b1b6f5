"""merge_heads: f key/value heads become one, whose state is f times as large as theirs together (docs/surgery.md).

Reinit and inherit are StateX's (arXiv 2509.22630); preserve, with its mixing matrix, is this project's.
"""

from __future__ import annotations

from ...families.description import LayerDescription
from ..lazy import LazyTensor
from ..merge_delta import merge_delta_net, merge_gated_deltanet
from ..merging import Merge, MergeHeadsOptions, merge_linear_attention
from ..operator import Context, Operator, Tensors, require_factor

MERGES: dict[str, Merge] = {
    "gla": merge_linear_attention(norm_per_head=True),
    "hgrn2": merge_linear_attention(norm_per_head=False),
    "delta_net": merge_delta_net,
    "gated_deltanet": merge_gated_deltanet,
}
"""How each family merges heads. A family that takes the operator adds a line here."""


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
    if layer.spectrum == "learned" and options.init == "inherit":
        raise context.error("a merge with init `inherit` cannot keep each head's learned spectrum", "use preserve or reinit")
    if layer.mixing == "channel" and options.mixing == "scalar":
        raise context.error("its mixing is per channel already and cannot become scalar", "use channel")


def apply(
    layer: LayerDescription, tensors: Tensors, options: MergeHeadsOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Merge each `factor` consecutive key/value heads, as the family does it."""
    return MERGES[context.family.name](layer, tensors, options, context)


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
