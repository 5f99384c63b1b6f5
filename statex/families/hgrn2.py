"""HGRN2 (arXiv 2404.07904), as fla stores it: model type `hgrn2`; and the layers that it shares with HGRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, ExportError
from .base import Family, Init, Shape, TensorSpec
from .description import LayerDescription, ModelDescription
from .facts import MEND, Facts, changed_keys, divide, uniform_layer
from .fla import (
    EMBEDDING_STD,
    GATED_MLP,
    default_mlp_width,
    mixing_rows,
    mlp_width,
    refuse_hybrids,
    require_one_of,
    short_convolution,
)

SHARED_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "num_hidden_layers": 24,
    "use_short_conv": False,
    "conv_size": 4,
    "use_lower_bound": True,
    "hidden_act": "swish",
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
"""What fla's `HGRNConfig` and `HGRN2Config` alike assume when a key is absent."""

DEFAULTS: dict[str, Any] = SHARED_DEFAULTS | {"expand_ratio": 128}
"""The same of `HGRN2Config`."""

WITH_CODE = "Export with --to hf, which carries the code"


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelDescription:
    """The description of a `hgrn2` checkpoint; see `Family.describe`."""
    facts = Facts(config, DEFAULTS, shapes)
    hidden = facts.integer("hidden_size")
    heads = _heads(facts, hidden)
    width = divide(hidden, heads, "hidden_size must be a multiple of the number of heads")
    facts.agree("hidden_size", hidden, "model.layers.0.mixer.q_proj.weight", 0)
    layer = LayerDescription(
        query_heads=heads,
        key_heads=heads,
        value_heads=heads,
        key_dim=width,
        value_dim=width,
        scale=width**-0.5,
        norm_groups=1,
        outer="alone",
    )
    return describe_model(facts, "hgrn2", layer, hidden)


def _heads(facts: Facts, hidden: int) -> int:
    """Number of heads, which fla takes from expand_ratio, the channels of each, and from num_heads only where that is null."""
    named = facts.integer("num_heads", optional=True)
    unset = "expand_ratio" in facts.config and facts.config["expand_ratio"] is None
    if unset and named is None:
        raise CheckpointError("neither expand_ratio nor num_heads says how large a head is", where="config.json", fix=MEND)
    if unset:
        return int(named)
    width = int(facts.integer("expand_ratio"))
    heads = divide(hidden, width, f"hidden_size ({hidden}) must be a multiple of expand_ratio ({width})")
    if named is not None and named != heads:
        default = "" if "expand_ratio" in facts.config else ", the default"
        instead = f", or set expand_ratio to {hidden // named}" if hidden % named == 0 else ""
        raise CheckpointError(
            f"num_heads ({named}) contradicts expand_ratio ({width}){default}, which makes {heads} heads of {width} channels",
            where="config.json",
            fix=f"Drop num_heads, which fla ignores while expand_ratio is set{instead}",
        )
    return heads


def describe_model(facts: Facts, family: str, layer: LayerDescription, channels: int) -> ModelDescription:
    """A model around layers that are all alike; `channels` is the width of its mixers.

    Raises:
        CheckpointError: what fla's HGRN and HGRN2 alike do not have, or a disagreement with the shapes.
    """
    refuse_hybrids(facts, family.upper())
    require_one_of(facts, {"hidden_act": ("swish",)})
    hidden, count, intermediate = facts.integer("hidden_size"), facts.layers(), mlp_width(facts, facts.integer("hidden_size"))
    bounded, mixer = facts.flag("use_lower_bound"), "model.layers.0.mixer"
    facts.agree("hidden_size", hidden, "model.embeddings.weight", 1)
    facts.agree("vocab_size", facts.integer("vocab_size"), "model.embeddings.weight", 0)
    facts.agree("num_hidden_layers", count, "model.lower_bounds", 0)
    facts.agree("conv_size", facts.integer("conv_size"), f"{mixer}.i_conv1d.weight", 2)
    facts.agree("intermediate_size", intermediate, "model.layers.0.mlp.up_proj.weight", 0)
    return ModelDescription(
        family=family,
        hidden_size=hidden,
        vocab_size=facts.integer("vocab_size"),
        norm_eps=facts.number("norm_eps"),
        tie_word_embeddings=facts.tied(),
        layers=(layer,) * count,
        intermediate_size=intermediate,
        lower_bound_channels=channels if bounded else None,
        mixer={
            "elementwise_affine": facts.flag("elementwise_affine"),
            "use_short_conv": facts.flag("use_short_conv"),
            "conv_size": facts.integer("conv_size"),
            "conv_bias": f"{mixer}.i_conv1d.bias" in facts.shapes,
        },
    )


def shared_keys(model: ModelDescription) -> dict[str, Any]:
    """The config keys of a stock checkpoint that HGRN and HGRN2 alike have."""
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": len(model.layers),
        "use_lower_bound": model.lower_bound_channels is not None,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        **{key: model.mixer[key] for key in ("elementwise_affine", "use_short_conv", "conv_size")},
    }


def native_config(model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the stock `hgrn2` checkpoint of this description; see `Family.native_config`."""
    layer = stock_layer(model)
    width, channels = layer.key_dim, layer.key_heads * layer.key_dim
    if channels != model.hidden_size:
        what = f"the layers are {channels} channels wide, and those of a stock hgrn2 as wide as hidden_size ({model.hidden_size})"
        raise ExportError(what, fix=WITH_CODE)
    stock = {"scale": width**-0.5, "norm_groups": 1, "query_heads": layer.key_heads, "value_dim": width, "blocks": 1}
    require_stock(layer, stock, f"a stock hgrn2 layer of heads of {width} channels")
    wanted = shared_keys(model) | {"expand_ratio": width}
    if not source:
        return {"model_type": "hgrn2", "architectures": ["HGRN2ForCausalLM"], **wanted, "num_heads": layer.key_heads}
    if source.get("num_heads") is not None:
        wanted["num_heads"] = layer.key_heads
    if source.get("num_heads") == layer.key_heads and "expand_ratio" in source and source["expand_ratio"] is None:
        del wanted["expand_ratio"]  # null there, and num_heads says it
    return changed_keys(source, config_defaults(DEFAULTS, model, source), wanted)


def stock_layer(model: ModelDescription) -> LayerDescription:
    """The one description of all layers of a stock checkpoint; raises `ExportError` where they differ or hold new tensors."""
    added = [index for index, layer in enumerate(model.layers) if layer.outer == "added"]
    if added:
        what = f"layer {added[0]} carries the tensor mixer.outer_gain (outer_product, preserve), which no stock checkpoint can hold"
        raise ExportError(what, fix=f"{WITH_CODE}; outer_product by inherit or reinit makes a stock hgrn2")
    return uniform_layer(model, (("mixing", "mixer.mixing", "merge_heads, preserve"), ("lift", "mixer.lift_gamma", "lift_keys")))


def require_stock(layer: LayerDescription, stock: Mapping[str, float], what: str) -> None:
    """Raise `ExportError` on the first field of `layer` that is not as in `stock`; `what` names that layer."""
    for field, value in stock.items():
        if not math.isclose(getattr(layer, field), value):
            raise ExportError(f"the layers have {field} = {getattr(layer, field):g}, while {what} has {value:g}", fix=WITH_CODE)


def config_defaults(defaults: Mapping[str, Any], model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """What keys mean that `source` lacks, the MLP's width among them."""
    width = default_mlp_width(model.hidden_size, source.get("hidden_ratio") or defaults["hidden_ratio"])
    return {**defaults, "intermediate_size": width}


def key_channels(model: ModelDescription, layer: LayerDescription) -> int:
    """Rows of the projections to queries and to forget gates, which are the keys."""
    return layer.key_heads * layer.key_dim


def value_channels(model: ModelDescription, layer: LayerDescription) -> int:
    """Rows of the projection to values."""
    return layer.value_heads * layer.value_dim


def _alone(model: ModelDescription, layer: LayerDescription) -> bool:
    return layer.outer == "alone"


def _gated(model: ModelDescription, layer: LayerDescription) -> bool:
    return layer.outer != "alone"


def _only_alone(spec: TensorSpec) -> TensorSpec:
    return replace(spec, present=lambda m, l: _alone(m, l) and spec.present(m, l))


LAYER_TENSORS: tuple[TensorSpec, ...] = (
    TensorSpec("mixer_norm.weight", lambda m, l: (m.hidden_size,), "norm", Init("ones")),
    TensorSpec("mixer.q_proj.weight", lambda m, l: (key_channels(m, l), m.hidden_size), "projection", EMBEDDING_STD, _alone),
    TensorSpec("mixer.f_proj.weight", lambda m, l: (key_channels(m, l), m.hidden_size), "projection", EMBEDDING_STD),
    TensorSpec("mixer.i_proj.weight", lambda m, l: (value_channels(m, l), m.hidden_size), "projection", EMBEDDING_STD),
    TensorSpec("mixer.g_proj.weight", lambda m, l: (value_channels(m, l), m.hidden_size), "projection", EMBEDDING_STD, _gated),
    *map(_only_alone, short_convolution("q", key_channels)),
    *short_convolution("f", key_channels),
    *short_convolution("i", value_channels),
    TensorSpec(
        "mixer.g_norm.weight",
        lambda m, l: (value_channels(m, l),),
        "norm",
        Init("ones"),
        lambda m, l: bool(m.mixer["elementwise_affine"]),
    ),
    TensorSpec("mixer.o_proj.weight", lambda m, l: (m.hidden_size, value_channels(m, l)), "projection", EMBEDDING_STD),
    TensorSpec("mixer.outer_gain", lambda m, l: (value_channels(m, l),), "mixing", Init("ones"), lambda m, l: l.outer == "added"),
    TensorSpec(
        "mixer.mixing",
        lambda m, l: (l.key_heads, mixing_rows(l), l.blocks),
        "mixing",
        Init("identity"),
        lambda m, l: l.mixing is not None,
    ),
    TensorSpec(
        "mixer.lift_gamma", lambda m, l: (l.query_heads, (l.lift - 1) * l.key_dim), "lift", Init("ones"), lambda m, l: l.lift > 1
    ),
    TensorSpec(
        "mixer.spectrum_rho", lambda m, l: (l.key_heads, l.blocks), "decay", Init("zeros"), lambda m, l: l.spectrum == "learned"
    ),
    *GATED_MLP,
)
"""All tensors that a layer of HGRN or HGRN2 can have."""

MODEL_TENSORS: tuple[TensorSpec, ...] = (
    TensorSpec(
        "lower_bounds",
        lambda m, l: (len(m.layers), m.lower_bound_channels or 0),
        "decay",
        Init("zeros"),
        lambda m, l: m.lower_bound_channels is not None,
    ),
)
"""The table of lower bounds, which no layer owns: a layer's bounds are a softmax over all layers, summed up to it."""

HGRN2 = Family(
    name="hgrn2",
    describe=describe,
    native_config=native_config,
    layer_tensors=LAYER_TENSORS,
    model_tensors=MODEL_TENSORS,
    operators=("merge_heads", "lift_keys", "extend_spectrum"),
    default_operator="merge_heads",
    default_layers="every:6",
    default_factor=None,
    adaptable=("q_proj", "f_proj", "i_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
