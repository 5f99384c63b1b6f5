"""lift_keys: keys and queries carry products of their own channels, so every state grows f-fold (docs/surgery.md, "lift_keys").

All inits are this project's. What the method names, and reinit draws afresh, are the keys and the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...families.description import LayerDescription
from .. import mamba2_rows, mamba_rows
from ..lazy import LazyTensor
from ..operator import Context, Operator, Options, Tensors, require_factor

GAMMA = "mixer.lift_gamma"


@dataclass(frozen=True)
class LiftKeysOptions(Options):
    """Options of lift_keys."""

    factor: int | None = field(
        default=None,
        metadata={"help": "parts of the lifted key, itself included; 4 when left out (fewer where a key is too short)"},
    )


def largest_lift(layer: LayerDescription) -> int:
    """Parts that a key can have while no product comes twice.

    x∘roll(x, K-r) is x∘roll(x, r) rolled on, so from r = K/2 on every product has been there: equal rows that never part.
    """
    return (layer.key_dim - 1) // 2 + 1


def check(layer: LayerDescription, options: LiftKeysOptions, context: Context) -> None:
    """Raise `PlanError` where the layer cannot be lifted as asked."""
    if layer.key_dim == 1:
        raise context.error("its state is a vector, without keys to lift", "use outer_product first; one plan may hold both")
    lift = layer.lift * require_factor(options, context)
    if lift > largest_lift(layer):
        raise context.error(
            f"a key of {layer.key_dim} channels has too few different products for a lift of ×{lift} in all",
            f"it allows ×{largest_lift(layer)} in all; merge or widen first for more",
        )


def apply(
    layer: LayerDescription, tensors: Tensors, options: LiftKeysOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Add γ, the gate on the query's new parts. A lifted layer is lifted further: its parts and their γ stay, more follow."""
    lifted = layer.replace(lift=layer.lift * require_factor(options, context))
    old = tensors.get(GAMMA)
    shape = context.spec(GAMMA).shape(context.model, lifted)

    def gates() -> Tensor:
        known = torch.empty(shape[0], 0) if old is None else old.load().float()
        if options.init == "preserve":
            added = torch.zeros(shape[0], shape[1] - known.shape[1])
        elif options.init == "inherit":
            added = torch.ones(shape[0], shape[1] - known.shape[1])
        else:
            return context.draw(GAMMA, shape)
        return torch.cat([known, added], dim=1)

    result = dict(tensors) | {GAMMA: LazyTensor(shape, torch.float32, gates, status="new")}
    if options.init == "reinit":
        result |= REDRAW[context.family.name](layer, tensors, context)
    return lifted, result


def _redraw_mamba(layer: LayerDescription, tensors: Tensors, context: Context) -> dict[str, LazyTensor]:
    name: str = mamba_rows.PROJECTION
    return {name: tensors[name].then(lambda old: mamba_rows.redraw(old, layer, layer, context))}


Redraw = Callable[[LayerDescription, Tensors, Context], dict[str, LazyTensor]]


def _redraw_whole(*parts: str) -> Redraw:
    """Draws the projections and convolutions of these parts afresh, whole."""
    names = [f"mixer.{part}_{tensor}" for part in parts for tensor in ("proj.weight", "conv1d.weight", "conv1d.bias")]

    def redraw(layer: LayerDescription, tensors: Tensors, context: Context) -> dict[str, LazyTensor]:
        present = [name for name in names if name in tensors]
        return {name: context.fresh(name, tensors[name], tensors[name].shape) for name in present}

    return redraw


def _redraw_mamba2(layer: LayerDescription, tensors: Tensors, context: Context) -> dict[str, LazyTensor]:
    present = [name for name in mamba2_rows.NAMES if name in tensors]
    return {name: tensors[name].then(partial(_redraw_rows, name, layer, context)) for name in present}


def _redraw_rows(name: str, layer: LayerDescription, context: Context, old: Tensor) -> Tensor:
    return mamba2_rows.redraw(name, old, layer, layer, context)


REDRAW: dict[str, Redraw] = {
    "gla": _redraw_whole("q", "k"),
    "mamba2": _redraw_mamba2,
    "delta_net": _redraw_whole("q", "k"),
    "gated_deltanet": _redraw_whole("q", "k"),
    "hgrn": _redraw_whole("q", "g", "f"),  # a key is what the forget gate f lets go of; a query may be the output gate g
    "hgrn2": _redraw_whole("q", "f"),
    "mamba": _redraw_mamba,
}
"""How each family draws its keys and queries afresh. A family that takes the operator adds a line here."""


OPERATOR = Operator(
    name="lift_keys",
    summary="appends products of key channels to keys and queries, so that the state is f times as large",
    stage=30,
    options=LiftKeysOptions,
    default_factor=lambda layer: min(4, largest_lift(layer)),
    default_layers="all",
    check=check,
    apply=apply,
)
