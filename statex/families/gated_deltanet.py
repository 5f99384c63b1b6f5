"""Gated DeltaNet (arXiv 2412.06464), as fla stores it: model type `gated_deltanet`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .base import Family, Init, Shape, TensorSpec
from .delta_rule import ADAPTABLE, layer_tensors, stock_layer
from .description import LayerDescription, ModelDescription
from .facts import Facts, changed_keys, divide
from .fla import EMBEDDING_STD, default_mlp_width, expanded, mlp_width, refuse_hybrids, require_one_of

DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "expand_v": 2.0,
    "head_dim": 256,
    "num_heads": 6,
    "hidden_ratio": 4,
    "num_hidden_layers": 21,
    "use_gate": True,
    "output_gate_activation": "swish",
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
"""What fla's `GatedDeltaNetConfig` assumes when a key is absent."""

KNOWN: dict[str, tuple[str | None, ...]] = {
    "hidden_act": ("swish",),
    "output_gate_activation": ("swish", "silu", "sigmoid"),
}

TIME_STEPS = {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4}
"""Range that fla draws softplus(dt_bias) from; no config key reaches it."""


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelDescription:
    """The description of a `gated_deltanet` checkpoint; see `Family.describe`."""
    facts = Facts(config, DEFAULTS, shapes)
    refuse_hybrids(facts, "Gated DeltaNet")
    require_one_of(facts, KNOWN)
    hidden, heads, key_dim = facts.integer("hidden_size"), facts.integer("num_heads"), facts.integer("head_dim")
    value_heads = facts.integer("num_v_heads", optional=True) or heads
    divide(value_heads, heads, f"num_v_heads ({value_heads}) must be a multiple of num_heads ({heads})")
    value_dim, intermediate = expanded(facts, key_dim, "expand_v", "head_dim"), mlp_width(facts, hidden)
    mixer = "model.layers.0.mixer"
    facts.agree("hidden_size", hidden, "model.embeddings.weight", 1)
    facts.agree("vocab_size", facts.integer("vocab_size"), "model.embeddings.weight", 0)
    facts.agree("num_heads * head_dim", heads * key_dim, f"{mixer}.k_proj.weight", 0)
    facts.agree("num_v_heads", value_heads, f"{mixer}.A_log", 0)
    facts.agree("num_v_heads * head_dim * expand_v", value_heads * value_dim, f"{mixer}.v_proj.weight", 0)
    facts.agree("head_dim * expand_v", value_dim, f"{mixer}.o_norm.weight", 0)
    facts.agree("conv_size", facts.integer("conv_size"), f"{mixer}.q_conv1d.weight", 2)
    facts.agree("intermediate_size", intermediate, "model.layers.0.mlp.up_proj.weight", 0)
    layer = LayerDescription(
        query_heads=heads,
        key_heads=heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=key_dim**-0.5,
        norm_groups=value_heads,
        spectrum="fixed" if facts.flag("allow_neg_eigval") else None,
    )
    return ModelDescription(
        family="gated_deltanet",
        hidden_size=hidden,
        vocab_size=facts.integer("vocab_size"),
        norm_eps=facts.number("norm_eps"),
        tie_word_embeddings=facts.tied(),
        layers=(layer,) * facts.layers(),
        intermediate_size=intermediate,
        mixer={
            "use_beta": True,
            "use_gate": facts.flag("use_gate"),
            "gate_fn": facts.get("output_gate_activation"),
            "qk_norm": "l2",
            "qk_activation": "silu",
            "use_short_conv": facts.flag("use_short_conv"),
            "conv_size": facts.integer("conv_size"),
            "conv_bias": f"{mixer}.q_conv1d.bias" in shapes,
            **TIME_STEPS,
        },
    )


def native_config(model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the stock `gated_deltanet` checkpoint of this description; see `Family.native_config`."""
    layer = stock_layer(model)
    unsaid = source.get("num_v_heads") is None and layer.value_heads == layer.key_heads
    wanted: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "head_dim": layer.key_dim,
        "num_heads": layer.key_heads,
        "num_v_heads": None if unsaid else layer.value_heads,
        "expand_v": _ratio(layer.value_dim, layer.key_dim),
        "num_hidden_layers": len(model.layers),
        "allow_neg_eigval": layer.spectrum == "fixed",
        "output_gate_activation": model.mixer["gate_fn"],
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        **{key: model.mixer[key] for key in ("use_gate", "use_short_conv", "conv_size")},
    }
    if not source:
        return {"model_type": "gated_deltanet", "architectures": ["GatedDeltaNetForCausalLM"], **wanted}
    width = default_mlp_width(model.hidden_size, source.get("hidden_ratio") or DEFAULTS["hidden_ratio"])
    return changed_keys(source, DEFAULTS | {"intermediate_size": width}, wanted)


def _ratio(value_dim: int, key_dim: int) -> float:
    """expand_v such that `int(key_dim * expand_v)`, which is what fla computes, is `value_dim` and not one less."""
    ratio = value_dim / key_dim
    return ratio if int(key_dim * ratio) == value_dim else math.nextafter(ratio, math.inf)


GATED_DELTANET = Family(
    name="gated_deltanet",
    describe=describe,
    native_config=native_config,
    layer_tensors=layer_tensors(
        TensorSpec("mixer.a_proj.weight", lambda m, l: (l.value_heads, m.hidden_size), "decay", EMBEDDING_STD),
        # fla draws from (0, 16], and log(0) would stop the head's decay for ever.
        TensorSpec("mixer.A_log", lambda m, l: (l.value_heads,), "decay", Init("mamba_A_log", (("low", 1e-4), ("high", 16.0)))),
        TensorSpec("mixer.dt_bias", lambda m, l: (l.value_heads,), "decay", Init("mamba_dt_bias")),
    ),
    operators=("merge_heads", "lift_keys", "extend_spectrum"),
    default_operator="lift_keys",
    default_layers="all",
    default_factor=None,
    adaptable=ADAPTABLE,
)
