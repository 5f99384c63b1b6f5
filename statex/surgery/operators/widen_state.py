"""widen_state: keys and queries, Mamba's B and C, become f times as long by new rows (docs/surgery.md, "widen_state").

Reinit and inherit of Mamba-2 are StateX's (arXiv 2509.22630); preserve is this project's.
"""

from __future__ import annotations

from dataclasses import fields

from ...families.description import LayerDescription
from ...families.gla import NO_START_AT_ZERO
from ..lazy import LazyTensor
from ..operator import Context, Operator, Tensors, require_factor
from ..widening import Widen, WidenStateOptions, widen_gla, widen_mamba, widen_mamba2

WIDENINGS: dict[str, Widen] = {"mamba2": widen_mamba2, "mamba": widen_mamba, "gla": widen_gla}
"""How each family makes its state wider. A family that takes the operator adds a line here."""


def check(layer: LayerDescription, options: WidenStateOptions, context: Context) -> None:
    """Raise `PlanError` where the layer cannot be widened as asked."""
    require_factor(options, context)
    for field in fields(options):
        family = field.metadata.get("family", context.family.name)
        if getattr(options, field.name) != field.default and context.family.name != family:
            raise context.error(
                f"`{field.name}` of widen_state is for the family {family}, not for {context.family.name}", "drop it"
            )
    if layer.lift > 1:
        raise context.error(
            f"its keys are lifted ×{layer.lift}: a wider key has other products, and the function would change",
            "widen the unlifted checkpoint, then lift; one plan may hold both",
        )
    feature_map = context.model.mixer.get("feature_map")
    if options.init == "preserve" and feature_map in NO_START_AT_ZERO:
        raise context.error(
            f"its keys and queries go through a {feature_map}, which {NO_START_AT_ZERO[feature_map]}",
            "use lift_keys, or init inherit or reinit",
        )


def apply(
    layer: LayerDescription, tensors: Tensors, options: WidenStateOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Make keys and queries `factor` times as long, as the family does it."""
    wide = layer.replace(key_dim=layer.key_dim * require_factor(options, context))
    return WIDENINGS[context.family.name](layer, wide, tensors, options, context)


OPERATOR = Operator(
    name="widen_state",
    summary="gives keys and queries (Mamba: B and C) new rows, so that the state is f times as large",
    stage=25,
    options=WidenStateOptions,
    default_factor=lambda layer: 4,
    default_layers="all",
    check=check,
    apply=apply,
)
