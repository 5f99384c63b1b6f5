"""HGRN (arXiv 2311.04823), as fla stores it: model type `hgrn`. Its state is a vector, a number per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .base import Family, Shape
from .description import LayerDescription, ModelDescription
from .facts import Facts, changed_keys
from .fla import expanded
from .hgrn2 import (
    LAYER_TENSORS,
    MODEL_TENSORS,
    SHARED_DEFAULTS,
    config_defaults,
    describe_model,
    require_stock,
    shared_keys,
    stock_layer,
)
from .hgrn2 import native_config as hgrn2_config

DEFAULTS: dict[str, Any] = SHARED_DEFAULTS | {"expand_ratio": 1}
"""What fla's `HGRNConfig` assumes when a key is absent."""

HGRNS_OWN = ("model_type", "architectures", "attn_mode", "expand_ratio", "auto_map")
"""Keys that mean something else, or nothing, in a config of HGRN2."""


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelDescription:
    """The description of a `hgrn` checkpoint; see `Family.describe`. A channel is a head of one channel."""
    facts = Facts(config, DEFAULTS, shapes)
    channels = expanded(facts, facts.integer("hidden_size"), "expand_ratio")
    facts.agree("hidden_size * expand_ratio", channels, "model.layers.0.mixer.i_proj.weight", 0)
    layer = LayerDescription(
        query_heads=channels, key_heads=channels, value_heads=channels, key_dim=1, value_dim=1, scale=1.0, norm_groups=1
    )
    return describe_model(facts, "hgrn", layer, channels)


def native_config(model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the stock checkpoint of this description: `hgrn`, or `hgrn2` once all layers are HGRN2's.

    See `Family.native_config`.
    """
    if all(layer.outer == "alone" for layer in model.layers):
        config = hgrn2_config(replace(model, family="hgrn2"), {})
        # What the source says beside (token ids, which kernels to fuse) means the same there.
        return {key: value for key, value in source.items() if key not in HGRNS_OWN} | config
    layer = stock_layer(model)
    require_stock(layer, {"scale": 1.0, "norm_groups": 1, "key_dim": 1, "value_dim": 1}, "a stock hgrn layer")
    ratio = layer.value_heads / model.hidden_size
    wanted = shared_keys(model) | {"expand_ratio": int(ratio) if ratio.is_integer() else ratio}
    if not source:
        return {"model_type": "hgrn", "architectures": ["HGRNForCausalLM"], **wanted}
    return changed_keys(source, config_defaults(DEFAULTS, model, source), wanted)


HGRN = Family(
    name="hgrn",
    describe=describe,
    native_config=native_config,
    layer_tensors=LAYER_TENSORS,
    model_tensors=MODEL_TENSORS,
    operators=("outer_product", "lift_keys"),
    default_operator="outer_product",
    default_layers="all",
    default_factor=None,
    adaptable=("q_proj", "f_proj", "i_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
