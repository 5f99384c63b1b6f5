"""Random weights for a model that is trained from scratch, by the inits that its family declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..families import Init, draw, get_family, keyed_generator

if TYPE_CHECKING:
    from .modeling import StatexForCausalLM

_SHARED = {
    "model.embeddings.weight": Init("normal", (("std", 0.02),)),
    "model.norm.weight": Init("ones"),
    "lm_head.weight": Init("normal", (("std", 0.02),)),
}
"""Inits of what is no layer's, alike in all families."""


@torch.no_grad()
def draw_weights(model: StatexForCausalLM, seed: int) -> None:
    """Draw every parameter in place, each from a generator keyed by (seed, its name)."""
    description = model.config.description
    inits = _SHARED | {f"model.{spec.name}": spec.init for spec in get_family(description.family).model_tensors}
    for index in range(len(description.layers)):
        inits |= {f"model.layers.{index}.{spec.name}": spec.init for spec in get_family(description.family).layer_tensors}
    for name, parameter in model.named_parameters():
        generator = keyed_generator(seed, name)
        parameter.copy_(draw(inits[name], tuple(parameter.shape), model=description, generator=generator))
