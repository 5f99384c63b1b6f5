"""How far the numbers that surgery added (mixing matrices, lift gates, ...) have moved from the value at which they do nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ..families import get_family
from ..families.description import LayerDescription, ModelDescription
from .components import Mixer
from .modeling import StatexForCausalLM

STOCK_ROLES = ("embedding", "projection", "conv", "norm", "bias", "decay")
"""Roles of tensors that a stock checkpoint has, too. All others are surgery's."""


@dataclass(frozen=True)
class Openness:
    """One tensor that surgery added.

    Attributes:
        tensor: its name within the layer. role: what it is for (`mixing`, `lift`, ...).
        numbers: how many it holds.
        rms, largest: root mean square and largest distance from the value at which the layer computes what it did before surgery.
    """

    tensor: str
    role: str
    numbers: int
    rms: float
    largest: float


@torch.no_grad()
def measure_openness(model: ModelDescription, layer: LayerDescription, mixer: Mixer) -> list[Openness]:
    """One entry for each tensor of the layer that surgery added; none for a stock layer."""
    neutral = _neutral(mixer)
    found = []
    for spec in get_family(model.family).layer_tensors:
        name = spec.name.removeprefix("mixer.")
        if spec.role in STOCK_ROLES or not spec.present(model, layer) or name not in neutral:
            continue
        distance = mixer.get_parameter(name).double() - neutral[name].double()
        rms, largest = float(distance.square().mean().sqrt()), float(distance.abs().max())
        found.append(Openness(spec.name, spec.role, distance.numel(), rms, largest))
    return found


def opened(model: StatexForCausalLM) -> float | None:
    """Root mean square distance of all that surgery added from where it does nothing; None where it added nothing."""
    description = model.config.description
    layers = zip(description.layers, model.model.layers, strict=True)
    found = [one for layer, block in layers for one in measure_openness(description, layer, block.mixer)]
    numbers = sum(one.numbers for one in found)
    return (sum(one.numbers * one.rms**2 for one in found) / numbers) ** 0.5 if numbers else None


def _neutral(mixer: Mixer) -> dict[str, nn.Parameter]:
    """The mixer's own parameters as `reset_own_parameters` sets them: those of surgery at the value at which they do nothing."""
    twin = copy.copy(mixer)
    own = {name: nn.Parameter(value.detach().clone()) for name, value in mixer.named_parameters(recurse=False)}
    twin.__dict__["_parameters"] = own
    twin.reset_own_parameters()
    return own
