"""Gated linear attention (arXiv 2312.06635), as fla stores it: model type `gla`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ExportError
from .base import Family, Init, Shape, TensorSpec
from .description import LayerDescription, ModelDescription
from .facts import Facts, changed_keys, divide, uniform_layer
from .fla import (
    GATED_MLP,
    default_mlp_width,
    expanded,
    mixing_rows,
    mlp_width,
    refuse_hybrids,
    require_one_of,
    short_convolution,
)

DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "hidden_ratio": 4,
    "num_hidden_layers": 24,
    "num_heads": 4,
    "use_short_conv": False,
    "conv_size": 4,
    "use_output_gate": True,
    "hidden_act": "swish",
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
"""What fla's `GLAConfig` assumes when a key is absent."""

GATE_LOGIT_NORMALIZER = 16
"""fla divides logsigmoid of the gate logits by this; no config key reaches it."""

GATE_LOW_RANK_DIM = 16
"""Inner channels of the two gate projections in fla; no config key reaches it."""

FEATURE_MAPS = (None, "relu", "sigmoid", "silu", "swish")

NO_START_AT_ZERO = {"relu": "has no slope at 0, so zeros never move", "sigmoid": "is 1/2 at 0, so zeros are not silent"}
"""Feature maps behind which channels cannot start at zero, and why. The others are 0 at 0, with a slope: 1, or SiLU's 1/2."""

XAVIER = Init("xavier_uniform", (("gain", 2**-2.5),))


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelDescription:
    """The description of a `gla` checkpoint; see `Family.describe`."""
    facts = Facts(config, DEFAULTS, shapes)
    refuse_hybrids(facts, "GLA")
    require_one_of(facts, {"hidden_act": ("swish",), "feature_map": FEATURE_MAPS})
    hidden, heads = facts.integer("hidden_size"), facts.integer("num_heads")
    kv_heads = facts.integer("num_kv_heads", optional=True) or heads
    groups = divide(heads, kv_heads, f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads})")
    key_channels, value_channels = expanded(facts, hidden, "expand_k"), expanded(facts, hidden, "expand_v")
    key_dim = divide(key_channels, heads, f"hidden_size * expand_k must be a multiple of num_heads ({heads})")
    value_dim = divide(value_channels, heads, f"hidden_size * expand_v must be a multiple of num_heads ({heads})")
    intermediate = mlp_width(facts, hidden)
    mixer = "model.layers.0.mixer"
    facts.agree("hidden_size", hidden, "model.embeddings.weight", 1)
    facts.agree("vocab_size", facts.integer("vocab_size"), "model.embeddings.weight", 0)
    facts.agree("hidden_size * expand_k", key_channels, f"{mixer}.q_proj.weight", 0)
    facts.agree("hidden_size * expand_v", value_channels, f"{mixer}.o_proj.weight", 1)
    facts.agree(
        f"hidden_size * expand_k * num_kv_heads / num_heads ({kv_heads}/{heads})",
        key_channels // groups,
        f"{mixer}.k_proj.weight",
        0,
    )
    facts.agree(f"hidden_size * expand_v / num_heads ({heads})", value_dim, f"{mixer}.g_norm.weight", 0)
    facts.agree("intermediate_size", intermediate, "model.layers.0.mlp.up_proj.weight", 0)
    layer = LayerDescription(
        query_heads=heads,
        key_heads=kv_heads,
        value_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=key_dim**-0.5,
        norm_groups=heads,
    )
    return ModelDescription(
        family="gla",
        hidden_size=hidden,
        vocab_size=facts.integer("vocab_size"),
        norm_eps=facts.number("norm_eps"),
        tie_word_embeddings=facts.tied(),
        layers=(layer,) * facts.layers(),
        intermediate_size=intermediate,
        mixer={
            "gate_logit_normalizer": GATE_LOGIT_NORMALIZER,
            "gate_low_rank_dim": shapes[f"{mixer}.gk_proj.0.weight"][0]
            if f"{mixer}.gk_proj.0.weight" in shapes
            else GATE_LOW_RANK_DIM,
            "clamp_min": None if facts.get("clamp_min") is None else facts.number("clamp_min"),
            "feature_map": facts.get("feature_map"),
            "use_output_gate": facts.flag("use_output_gate"),
            "gate_fn": "swish",
            "elementwise_affine": facts.flag("elementwise_affine"),
            "use_short_conv": facts.flag("use_short_conv"),
            "conv_size": facts.integer("conv_size"),
            "conv_bias": f"{mixer}.q_conv1d.bias" in shapes,
        },
    )


def native_config(model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the stock `gla` checkpoint of this description; see `Family.native_config`."""
    new_tensors = (("mixing", "mixer.mixing", "merge_heads, preserve"), ("lift", "mixer.lift_gamma", "lift_keys"))
    layer = uniform_layer(model, new_tensors)
    scale = layer.key_dim**-0.5 * _query_factor(model, layer)
    stock = {"scale": scale, "norm_groups": layer.query_heads, "value_heads": layer.key_heads, "blocks": 1}
    for field, value in stock.items():
        if not math.isclose(getattr(layer, field), value):
            raise ExportError(
                f"the layers have {field} = {getattr(layer, field):g}, while a stock gla layer of {layer.query_heads} heads"
                f" with keys of {layer.key_dim} channels has {value:g}",
                fix="Export with --to hf, which carries the code",
            )
    if model.mixer["gate_logit_normalizer"] != GATE_LOGIT_NORMALIZER:
        raise ExportError(
            f"stock gla divides gate logits by {GATE_LOGIT_NORMALIZER}, this model by {model.mixer['gate_logit_normalizer']}",
            fix="Export with --to hf, which carries the code",
        )
    wanted: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "expand_k": layer.query_heads * layer.key_dim / model.hidden_size,
        "expand_v": layer.query_heads * layer.value_dim / model.hidden_size,
        "num_hidden_layers": len(model.layers),
        "num_heads": layer.query_heads,
        "num_kv_heads": None if source.get("num_kv_heads") is None and layer.key_heads == layer.query_heads else layer.key_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        **{
            key: model.mixer[key]
            for key in ("use_short_conv", "conv_size", "use_output_gate", "elementwise_affine", "feature_map", "clamp_min")
        },
    }
    if not source:
        return {"model_type": "gla", "architectures": ["GLAForCausalLM"], **wanted}
    width = default_mlp_width(model.hidden_size, source.get("hidden_ratio") or DEFAULTS["hidden_ratio"])
    return changed_keys(source, DEFAULTS | {"intermediate_size": width}, wanted)


def native_factors(model: ModelDescription) -> dict[str, float]:
    """See `Family.native_factors`: q_proj takes what the scale of a stock layer lacks."""
    factor = _query_factor(model, model.layers[0])
    return {} if factor == 1 else {"mixer.q_proj.weight": factor}


def _query_factor(model: ModelDescription, layer: LayerDescription) -> float:
    """The power of two by which q_proj can make up for the stock scale; 1 where something bent follows it, or none can."""
    ratio = layer.scale * layer.key_dim**0.5
    power = 2.0 ** round(math.log2(ratio))
    linear = not model.mixer["use_short_conv"] and model.mixer["feature_map"] is None
    return power if linear and math.isclose(ratio, power) else 1.0


def _query_channels(model: ModelDescription, layer: LayerDescription) -> int:
    return layer.query_heads * layer.key_dim


def _key_channels(model: ModelDescription, layer: LayerDescription) -> int:
    return layer.key_heads * layer.key_dim


def _value_channels(model: ModelDescription, layer: LayerDescription) -> int:
    return layer.value_heads * layer.value_dim


def _output_channels(model: ModelDescription, layer: LayerDescription) -> int:
    return layer.query_heads * layer.value_dim


def _has_gate(model: ModelDescription, layer: LayerDescription) -> bool:
    return bool(model.mixer["use_output_gate"])


def _mixing_shape(model: ModelDescription, layer: LayerDescription) -> Shape:
    """Scalar `[key_heads, blocks, blocks]`, per channel `[key_heads, key_dim, blocks]`; columns are value blocks."""
    return (layer.key_heads, mixing_rows(layer), layer.blocks)


GLA = Family(
    name="gla",
    describe=describe,
    native_config=native_config,
    native_factors=native_factors,
    layer_tensors=(
        TensorSpec("mixer_norm.weight", lambda m, l: (m.hidden_size,), "norm", Init("ones")),
        TensorSpec("mixer.q_proj.weight", lambda m, l: (_query_channels(m, l), m.hidden_size), "projection", XAVIER),
        TensorSpec("mixer.k_proj.weight", lambda m, l: (_key_channels(m, l), m.hidden_size), "projection", XAVIER),
        TensorSpec("mixer.v_proj.weight", lambda m, l: (_value_channels(m, l), m.hidden_size), "projection", XAVIER),
        TensorSpec("mixer.g_proj.weight", lambda m, l: (_output_channels(m, l), m.hidden_size), "projection", XAVIER, _has_gate),
        *short_convolution("q", _query_channels),
        *short_convolution("k", _key_channels),
        *short_convolution("v", _value_channels),
        TensorSpec("mixer.gk_proj.0.weight", lambda m, l: (m.mixer["gate_low_rank_dim"], m.hidden_size), "decay", XAVIER),
        TensorSpec("mixer.gk_proj.1.weight", lambda m, l: (_key_channels(m, l), m.mixer["gate_low_rank_dim"]), "decay", XAVIER),
        TensorSpec("mixer.gk_proj.1.bias", lambda m, l: (_key_channels(m, l),), "decay", Init("zeros")),
        TensorSpec(
            "mixer.g_norm.weight",
            lambda m, l: (_output_channels(m, l) // l.norm_groups,),
            "norm",
            Init("ones"),
            lambda m, l: bool(m.mixer["elementwise_affine"]),
        ),
        TensorSpec("mixer.o_proj.weight", lambda m, l: (m.hidden_size, _output_channels(m, l)), "projection", XAVIER),
        TensorSpec("mixer.mixing", _mixing_shape, "mixing", Init("identity"), lambda m, l: l.mixing is not None),
        TensorSpec(
            "mixer.lift_gamma",
            lambda m, l: (l.query_heads, (l.lift - 1) * l.key_dim),
            "lift",
            Init("ones"),
            lambda m, l: l.lift > 1,
        ),
        TensorSpec(
            "mixer.spectrum_rho",
            lambda m, l: (l.key_heads, l.blocks),
            "decay",
            Init("zeros"),
            lambda m, l: l.spectrum == "learned",
        ),
        *GATED_MLP,
    ),
    operators=("merge_heads", "widen_state", "lift_keys", "extend_spectrum"),
    default_operator="merge_heads",
    default_layers="every:6",
    default_factor=None,
    adaptable=("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
