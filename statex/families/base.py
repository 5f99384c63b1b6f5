"""What a family declares: its config keys, its tensors with shapes and roles, the operators it can take. Data, no modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .description import LayerDescription, ModelDescription

Role = Literal["embedding", "projection", "conv", "norm", "bias", "decay", "mixing", "lift"]
"""What a tensor is for. `decay`: A_log, dt_bias, D, gate projections: kept in fp32 when trained. `decay`, `mixing`, `lift`, `norm`
and `bias` are never weight-decayed."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Init:
    """How a tensor is drawn afresh: torch.nn.init's name and its arguments (`kind` `zeros`, `ones`, `normal`, `uniform`,
    `xavier_uniform`, or one that the family explains: `mamba_dt_bias`, `mamba_A_log`)."""

    kind: str
    args: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer, by its canonical name within the layer (`mixer.q_proj.weight`)."""

    name: str
    shape: Callable[[ModelDescription, LayerDescription], Shape]
    role: Role
    init: Init
    present: Callable[[ModelDescription, LayerDescription], bool] = lambda model, layer: True


@dataclass(frozen=True)
class Family:
    """A model family, described once and read by checkpoints, surgery, models, recipes and reports.

    Attributes:
        name: also the `model_type` of its native checkpoints (`gla`, `mamba2`).
        describe: (config in the family's own keys, shapes by canonical tensor name) -> description. Shapes and config are
            cross-checked; a disagreement raises `CheckpointError` that names both. Without shapes there is nothing to check.
        native_config: (description, source config in the family's own keys) -> config in the family's own keys for a stock
            checkpoint of that description; raises `ExportError` that says which layer or tensor kind no stock checkpoint can hold.
            An empty source gives a complete config.
        native_factors: description -> by their names within the layer, the tensors that a stock checkpoint holds multiplied, and by
            which power of two, so that no digit is lost; called after `native_config` has passed.
        layer_tensors: all tensors that a layer of the family can have.
        model_tensors: those that the layers share, named within the model; their shapes do not depend on the layer given.
        operators: names of the operators that the family can take.
        default_operator, default_layers, default_factor: the paper's plan for the family.
        adaptable: names of the linear modules that a PEFT adapter can wrap with effect.
    """

    name: str
    describe: Callable[[Mapping[str, Any], Mapping[str, Shape]], ModelDescription]
    native_config: Callable[[ModelDescription, Mapping[str, Any]], dict[str, Any]]
    layer_tensors: tuple[TensorSpec, ...]
    operators: tuple[str, ...]
    default_operator: str
    default_layers: str
    default_factor: int | None
    adaptable: tuple[str, ...]
    model_tensors: tuple[TensorSpec, ...] = ()
    native_factors: Callable[[ModelDescription], Mapping[str, float]] = lambda model: {}

    def tensors(self, model: ModelDescription) -> dict[str, tuple[Shape, Role]]:
        """Every canonical tensor name of a model with its shape and role (`lm_head.weight` is left out when tied)."""
        found: dict[str, tuple[Shape, Role]] = {
            "model.embeddings.weight": ((model.vocab_size, model.hidden_size), "embedding"),
            "model.norm.weight": ((model.hidden_size,), "norm"),
        }
        if not model.tie_word_embeddings:
            found["lm_head.weight"] = ((model.vocab_size, model.hidden_size), "embedding")
        for spec in self.model_tensors:
            if spec.present(model, model.layers[0]):
                found[f"model.{spec.name}"] = (spec.shape(model, model.layers[0]), spec.role)
        for index, layer in enumerate(model.layers):
            for spec in self.layer_tensors:
                if spec.present(model, layer):
                    found[f"model.layers.{index}.{spec.name}"] = (spec.shape(model, layer), spec.role)
        return found
