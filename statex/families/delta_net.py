"""DeltaNet (arXiv 2406.06484), as fla stores it: model type `delta_net`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ExportError
from .base import Family, Shape
from .delta_rule import ADAPTABLE, layer_tensors, stock_layer
from .description import LayerDescription, ModelDescription
from .facts import Facts, changed_keys, divide
from .fla import default_mlp_width, expanded, mlp_width, refuse_hybrids, require_one_of

DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "hidden_ratio": 4,
    "num_hidden_layers": 24,
    "num_heads": 16,
    "use_gate": False,
    "use_beta": True,
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
    "qk_norm": "l2",
    "qk_activation": "silu",
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
"""What fla's `DeltaNetConfig` assumes when a key is absent."""

KNOWN: dict[str, tuple[str | None, ...]] = {
    "hidden_act": ("swish",),
    "qk_norm": ("l2", "sum"),
    "qk_activation": ("silu", "relu", "elu", "identity"),
}


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelDescription:
    """The description of a `delta_net` checkpoint; see `Family.describe`."""
    facts = Facts(config, DEFAULTS, shapes)
    refuse_hybrids(facts, "DeltaNet")
    require_one_of(facts, KNOWN)
    hidden, heads = facts.integer("hidden_size"), facts.integer("num_heads")
    key_channels, value_channels = expanded(facts, hidden, "expand_k"), expanded(facts, hidden, "expand_v")
    key_dim = divide(key_channels, heads, f"hidden_size * expand_k must be a multiple of num_heads ({heads})")
    value_dim = divide(value_channels, heads, f"hidden_size * expand_v must be a multiple of num_heads ({heads})")
    intermediate = mlp_width(facts, hidden)
    mixer = "model.layers.0.mixer"
    facts.agree("hidden_size", hidden, "model.embeddings.weight", 1)
    facts.agree("vocab_size", facts.integer("vocab_size"), "model.embeddings.weight", 0)
    facts.agree("hidden_size * expand_k", key_channels, f"{mixer}.k_proj.weight", 0)
    facts.agree("hidden_size * expand_v", value_channels, f"{mixer}.v_proj.weight", 0)
    facts.agree(f"hidden_size * expand_v / num_heads ({heads})", value_dim, f"{mixer}.o_norm.weight", 0)
    facts.agree("num_heads", heads, f"{mixer}.b_proj.weight", 0)
    facts.agree("conv_size", facts.integer("conv_size"), f"{mixer}.q_conv1d.weight", 2)
    facts.agree("intermediate_size", intermediate, "model.layers.0.mlp.up_proj.weight", 0)
    layer = LayerDescription(
        query_heads=heads,
        key_heads=heads,
        value_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=key_dim**-0.5,
        norm_groups=heads,
        spectrum="fixed" if facts.flag("allow_neg_eigval") else None,
    )
    return ModelDescription(
        family="delta_net",
        hidden_size=hidden,
        vocab_size=facts.integer("vocab_size"),
        norm_eps=facts.number("norm_eps"),
        tie_word_embeddings=facts.tied(),
        layers=(layer,) * facts.layers(),
        intermediate_size=intermediate,
        mixer={
            "use_beta": facts.flag("use_beta"),
            "use_gate": facts.flag("use_gate"),
            "gate_fn": "swish",
            "qk_norm": facts.get("qk_norm"),
            "qk_activation": facts.get("qk_activation"),
            "use_short_conv": facts.flag("use_short_conv"),
            "conv_size": facts.integer("conv_size"),
            "conv_bias": f"{mixer}.q_conv1d.bias" in shapes,
        },
    )


def native_config(model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the stock `delta_net` checkpoint of this description; see `Family.native_config`."""
    layer = stock_layer(model)
    if layer.value_heads != layer.key_heads:
        what = f"the layers have {layer.value_heads} value heads and {layer.key_heads} key heads, and delta_net has as many of both"
        raise ExportError(what, fix="Export with --to hf, which carries the code")
    wanted: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "expand_k": layer.key_heads * layer.key_dim / model.hidden_size,
        "expand_v": layer.value_heads * layer.value_dim / model.hidden_size,
        "num_hidden_layers": len(model.layers),
        "num_heads": layer.key_heads,
        "allow_neg_eigval": layer.spectrum == "fixed",
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        **{key: model.mixer[key] for key in ("use_beta", "use_gate", "qk_norm", "qk_activation", "use_short_conv", "conv_size")},
    }
    if not source:
        return {"model_type": "delta_net", "architectures": ["DeltaNetForCausalLM"], **wanted}
    width = default_mlp_width(model.hidden_size, source.get("hidden_ratio") or DEFAULTS["hidden_ratio"])
    return changed_keys(source, DEFAULTS | {"intermediate_size": width}, wanted)


DELTA_NET = Family(
    name="delta_net",
    describe=describe,
    native_config=native_config,
    layer_tensors=layer_tensors(),
    operators=("merge_heads", "lift_keys", "extend_spectrum"),
    default_operator="lift_keys",
    default_layers="all",
    default_factor=None,
    adaptable=ADAPTABLE,
)
