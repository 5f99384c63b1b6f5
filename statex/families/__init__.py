"""The model families that statex knows: one file each, and one line here."""

from __future__ import annotations

from ..errors import CheckpointError
from .base import Family, Init, Role, TensorSpec
from .delta_net import DELTA_NET
from .description import LayerDescription, ModelDescription
from .draw import draw, keyed_generator
from .gated_deltanet import GATED_DELTANET
from .gla import GLA
from .hgrn import HGRN
from .hgrn2 import HGRN2
from .mamba import MAMBA
from .mamba2 import MAMBA2

FAMILIES: dict[str, Family] = {family.name: family for family in (GLA, MAMBA2, DELTA_NET, GATED_DELTANET, HGRN, HGRN2, MAMBA)}


def get_family(name: str) -> Family:
    """The family of that name (`gla`, `mamba2`). Raises `CheckpointError` when there is none."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"unknown model family {name!r}", fix=f"Supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


__all__ = [
    "FAMILIES",
    "Family",
    "Init",
    "LayerDescription",
    "ModelDescription",
    "Role",
    "TensorSpec",
    "draw",
    "get_family",
    "keyed_generator",
]
