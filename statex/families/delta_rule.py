"""What DeltaNet and Gated DeltaNet share: their tensors, and what a stock checkpoint of theirs can hold."""

from __future__ import annotations

import math

from ..errors import ExportError
from .base import Init, Shape, TensorSpec
from .description import LayerDescription, ModelDescription
from .facts import uniform_layer
from .fla import EMBEDDING_STD, GATED_MLP, mixing_rows, short_convolution

ADAPTABLE = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WITH_CODE = "Export with --to hf, which carries the code"


def key_channels(model: ModelDescription, layer: LayerDescription) -> int:
    """Rows of the projections to keys and, alike, to queries."""
    return layer.key_heads * layer.key_dim


def value_channels(model: ModelDescription, layer: LayerDescription) -> int:
    """Rows of the projections to values and output gates."""
    return layer.value_heads * layer.value_dim


def mixing_shape(model: ModelDescription, layer: LayerDescription) -> Shape:
    """`[key_heads, blocks, blocks, r]`, per channel `[key_heads, key_dim, blocks, r]`.

    The last two dimensions run over the head's values, r for each source head of keys: number [i, j, s] is how much of key block i
    the s-th value of source head j is written under.
    """
    return (layer.key_heads, mixing_rows(layer), layer.blocks, layer.value_heads // (layer.key_heads * layer.blocks))


def stock_layer(model: ModelDescription) -> LayerDescription:
    """The one description of all layers of a stock checkpoint.

    Raises:
        ExportError: the layers differ, or hold what no stock checkpoint can.
    """
    learned = [index for index, layer in enumerate(model.layers) if layer.spectrum == "learned"]
    if learned:
        raise ExportError(
            f"layer {learned[0]} carries the tensor mixer.spectrum_rho (extend_spectrum, preserve), and a stock {model.family}"
            " checkpoint has a switch only",
            fix=_WITH_CODE,
        )
    layer = uniform_layer(
        model,
        (("mixing", "mixer.mixing", "merge_heads, preserve"), ("lift", "mixer.lift_gamma", "lift_keys")),
        spectra=(None, "fixed"),
    )
    stock = {
        "scale": layer.key_dim**-0.5,
        "query_heads": layer.key_heads,
        "norm_groups": layer.value_heads,
        "blocks": 1,
    }
    for field, value in stock.items():
        if not math.isclose(getattr(layer, field), value):
            raise ExportError(
                f"the layers have {field} = {getattr(layer, field):g}, while a stock {model.family} layer of {layer.key_heads} key"
                f" heads of {layer.key_dim} channels has {value:g}",
                fix=_WITH_CODE,
            )
    return layer


def layer_tensors(*decay: TensorSpec) -> tuple[TensorSpec, ...]:
    """All tensors of a layer; `decay`: those that its decays come from."""
    return (
        TensorSpec("mixer_norm.weight", lambda m, l: (m.hidden_size,), "norm", Init("ones")),
        TensorSpec("mixer.q_proj.weight", lambda m, l: (key_channels(m, l), m.hidden_size), "projection", EMBEDDING_STD),
        TensorSpec("mixer.k_proj.weight", lambda m, l: (key_channels(m, l), m.hidden_size), "projection", EMBEDDING_STD),
        TensorSpec("mixer.v_proj.weight", lambda m, l: (value_channels(m, l), m.hidden_size), "projection", EMBEDDING_STD),
        TensorSpec(
            "mixer.b_proj.weight",
            lambda m, l: (l.value_heads, m.hidden_size),
            "decay",
            EMBEDDING_STD,
            lambda m, l: bool(m.mixer["use_beta"]),
        ),
        *decay,
        *short_convolution("q", key_channels),
        *short_convolution("k", key_channels),
        *short_convolution("v", value_channels),
        TensorSpec(
            "mixer.g_proj.weight",
            lambda m, l: (value_channels(m, l), m.hidden_size),
            "projection",
            EMBEDDING_STD,
            lambda m, l: bool(m.mixer["use_gate"]),
        ),
        TensorSpec("mixer.o_norm.weight", lambda m, l: (value_channels(m, l) // l.norm_groups,), "norm", Init("ones")),
        TensorSpec("mixer.o_proj.weight", lambda m, l: (m.hidden_size, value_channels(m, l)), "projection", EMBEDDING_STD),
        TensorSpec("mixer.mixing", mixing_shape, "mixing", Init("identity"), lambda m, l: l.mixing is not None),
        TensorSpec(
            "mixer.lift_gamma", lambda m, l: (l.key_heads, (l.lift - 1) * l.key_dim), "lift", Init("ones"), lambda m, l: l.lift > 1
        ),
        TensorSpec(
            "mixer.spectrum_rho", lambda m, l: (l.value_heads,), "decay", Init("zeros"), lambda m, l: l.spectrum == "learned"
        ),
        *GATED_MLP,
    )
