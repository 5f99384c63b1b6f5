"""What the families that fla publishes share: widths from ratios, what is refused, tensors of short convolutions and of the MLP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..errors import CheckpointError
from .base import Init, TensorSpec
from .description import LayerDescription, ModelDescription
from .facts import MEND, Facts

EMBEDDING_STD = Init("normal", (("std", 0.02),))
CONV = Init("kaiming_uniform", (("a", math.sqrt(5)),))

Channels = Callable[[ModelDescription, LayerDescription], int]


def refuse_hybrids(facts: Facts, family: str) -> None:
    """Raise `CheckpointError` on a config whose layers are not all of the family.

    Args:
        family: its name in the message (`GLA`).
    """
    unsupported = {
        "attn": "softmax attention layers (`attn`)",
        "attnres_block_size": "attention over residuals (`attnres_block_size`)",
    }
    for key, what in unsupported.items():
        if facts.get(key) is not None:
            raise CheckpointError(
                f"{what} are not supported", where="config.json", fix=f"Give a checkpoint of {family} layers alone"
            )


def require_one_of(facts: Facts, known: Mapping[str, tuple[str | None, ...]]) -> None:
    """Raise `CheckpointError` on a key whose value is none of those known."""
    for key, values in known.items():
        if facts.get(key) not in values:
            names = ", ".join(str(name) for name in values)
            raise CheckpointError(f"{key} {facts.get(key)!r} is not supported", where="config.json", fix=f"Supported: {names}")


def expanded(facts: Facts, size: int, key: str, said: str = "hidden_size") -> int:
    """Channels of `size * config[key]`, which must be whole, as in fla; `said` names the size in the message."""
    channels = size * facts.number(key)
    if not math.isfinite(channels) or round(channels) < 1 or not math.isclose(channels, round(channels)):
        raise CheckpointError(f"{said} * {key} must be a positive whole number, not {channels}", where="config.json", fix=MEND)
    return round(channels)


def mlp_width(facts: Facts, hidden: int) -> int:
    """Channels of the gated MLP: intermediate_size, or what fla makes of hidden_ratio."""
    return facts.integer("intermediate_size", optional=True) or default_mlp_width(hidden, facts.number("hidden_ratio"))


def default_mlp_width(hidden: int, ratio: float) -> int:
    """fla's width of the gated MLP: two thirds of `ratio * hidden`, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(hidden * ratio * 2 / 3) / 256)


def short_convolution(part: str, channels: Channels, init: Init = CONV) -> tuple[TensorSpec, TensorSpec]:
    """The short convolution of q, k or v: kernels `[C, 1, conv_size]` and, where there are any, biases."""

    def present(model: ModelDescription, layer: LayerDescription) -> bool:
        return bool(model.mixer["use_short_conv"])

    def biased(model: ModelDescription, layer: LayerDescription) -> bool:
        return bool(model.mixer["use_short_conv"] and model.mixer["conv_bias"])

    return (
        TensorSpec(f"mixer.{part}_conv1d.weight", lambda m, l: (channels(m, l), 1, m.mixer["conv_size"]), "conv", init, present),
        TensorSpec(f"mixer.{part}_conv1d.bias", lambda m, l: (channels(m, l),), "bias", Init("zeros"), biased),
    )


GATED_MLP: tuple[TensorSpec, ...] = (
    TensorSpec("mlp_norm.weight", lambda m, l: (m.hidden_size,), "norm", Init("ones")),
    TensorSpec("mlp.gate_proj.weight", lambda m, l: (m.intermediate_size or 0, m.hidden_size), "projection", EMBEDDING_STD),
    TensorSpec("mlp.up_proj.weight", lambda m, l: (m.intermediate_size or 0, m.hidden_size), "projection", EMBEDDING_STD),
    TensorSpec("mlp.down_proj.weight", lambda m, l: (m.hidden_size, m.intermediate_size or 0), "projection", EMBEDDING_STD),
)
"""The MLP and the norm in front of it."""


def mixing_rows(layer: LayerDescription) -> int:
    """Rows of `mixer.mixing`: one for each key block, or for each key channel."""
    return layer.key_dim if layer.mixing == "channel" else layer.blocks
