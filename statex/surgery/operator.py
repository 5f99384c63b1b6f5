"""What an operator is: an options dataclass, a check, and a pure function on one layer's named lazy tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import PlanError
from ..families import draw, keyed_generator
from ..families.base import Family, TensorSpec
from ..families.description import LayerDescription, ModelDescription
from .lazy import LazyTensor

InitName = Literal["preserve", "inherit", "reinit"]
Tensors = Mapping[str, LazyTensor]
"""A layer's tensors by their canonical name within the layer (`mixer.q_proj.weight`)."""


@dataclass(frozen=True)
class Options:
    """What every operator can be told.

    A field's metadata holds its `help`, as `only` the init that reads it, if not all do, and as `family` the family, likewise.
    """

    factor: int | None = field(default=None, metadata={"help": "how many times larger the state of each layer becomes"})
    init: InitName = field(
        default="preserve",
        metadata={
            "help": "preserve: the same function at step 0, with new degrees of freedom; inherit: weights kept, function changes; "
            "reinit: the parts that the method names are drawn afresh"
        },
    )


@dataclass(frozen=True)
class Context:
    """Where an operator works: the model around the layer, and the key of its random draws."""

    family: Family
    model: ModelDescription
    layer_index: int
    seed: int

    def full_name(self, name: str) -> str:
        """Canonical name in the checkpoint of a tensor of this layer."""
        return f"model.layers.{self.layer_index}.{name}"

    def generator(self, name: str, purpose: str = "") -> torch.Generator:
        """The random source of one tensor of this layer."""
        return keyed_generator(self.seed, self.full_name(name), purpose)

    def spec(self, name: str) -> TensorSpec:
        """What the family declares about a tensor of this layer."""
        return next(spec for spec in self.family.layer_tensors if spec.name == name)

    def draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this layer drawn by the family's init for it, fp32."""
        return draw(self.spec(name).init, shape, model=self.model, generator=self.generator(name))

    def fresh(self, name: str, old: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
        """`old` drawn afresh by the family's init, in its own dtype; the old values are not read."""
        return old.replaced(lambda: self.draw(name, shape).to(old.dtype), tuple(shape))

    def error(self, what: str, fix: str | None = None) -> PlanError:
        """A `PlanError` about this layer."""
        return PlanError(what, where=f"layer {self.layer_index}", fix=fix)


@dataclass(frozen=True)
class Operator:
    """One way to enlarge a layer's state, or to let it do more.

    Attributes:
        name: as written in plans.
        summary: one line for tables and model cards.
        stage: operators of one plan run on a layer in the order of their stages, whatever the order in the plan.
        options: its options, a frozen dataclass derived from `Options`; the field names and help texts are the YAML schema.
        default_factor: the factor for a layer when the plan gives none.
        default_layers: layers when the plan gives none and the family's paper plan is another operator's.
        check: (layer, options, context) -> None; raises `PlanError` where the operator is not defined. Reads no tensor.
        apply: (layer, tensors, options, context) -> (layer, all tensors of the layer); pure, and called after `check` has passed.
    """

    name: str
    summary: str
    stage: int
    options: type[Options]
    default_factor: Callable[[LayerDescription], int]
    default_layers: str
    check: Callable[[LayerDescription, Any, Context], None]
    apply: Callable[[LayerDescription, Tensors, Any, Context], tuple[LayerDescription, dict[str, LazyTensor]]]


def require_factor(options: Options, context: Context) -> int:
    """The factor of a resolved plan. Raises `PlanError` unless it is at least 2."""
    if options.factor is None or options.factor < 2:
        raise context.error(f"factor {options.factor} does not enlarge anything", "give a factor of 2 or more")
    return options.factor
