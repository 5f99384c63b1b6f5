"""Mamba (arXiv 2312.00752), in transformers' config keys: model type `mamba`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .base import Family, Init, Shape, TensorSpec
from .description import LayerDescription, ModelDescription
from .facts import Facts, changed_keys, uniform_layer
from .fla import expanded
from .mamba2 import LINEAR

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "residual_in_fp32": True,
    "time_step_rank": "auto",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "tie_word_embeddings": True,
}
"""What transformers' `MambaConfig` assumes when a key is absent."""


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelDescription:
    """The description of a `mamba` checkpoint; see `Family.describe`. B and C are one key and one query for all channels."""
    facts = Facts(config, DEFAULTS, shapes)
    if facts.get("hidden_act") not in ("silu", "swish"):
        raise CheckpointError(
            f"hidden_act {facts.get('hidden_act')!r} is not supported", where="config.json", fix="Supported: silu"
        )
    hidden, state = facts.integer("hidden_size"), facts.integer("state_size")
    inner, rank = expanded(facts, hidden, "expand"), _rank(facts, hidden)
    mixer = "model.layers.0.mixer"
    facts.agree("hidden_size", hidden, "model.embeddings.weight", 1)
    facts.agree("vocab_size", facts.integer("vocab_size"), "model.embeddings.weight", 0)
    facts.agree("hidden_size * expand", inner, f"{mixer}.A_log", 0)
    facts.agree("state_size", state, f"{mixer}.A_log", 1)
    facts.agree("time_step_rank", rank, f"{mixer}.dt_proj.weight", 1)
    facts.agree(f"time_step_rank ({rank}) + 2 * state_size ({state})", rank + 2 * state, f"{mixer}.x_proj.weight", 0)
    facts.agree("conv_kernel", facts.integer("conv_kernel"), f"{mixer}.conv1d.weight", 2)
    layer = LayerDescription(query_heads=1, key_heads=1, value_heads=1, key_dim=state, value_dim=inner, scale=1.0, norm_groups=1)
    return ModelDescription(
        family="mamba",
        hidden_size=hidden,
        vocab_size=facts.integer("vocab_size"),
        norm_eps=facts.number("layer_norm_epsilon"),
        tie_word_embeddings=facts.tied(),
        layers=(layer,) * facts.layers(),
        residual_in_fp32=facts.flag("residual_in_fp32"),
        mixer={
            "conv_size": facts.integer("conv_kernel"),
            "conv_bias": facts.flag("use_conv_bias"),
            "use_bias": facts.flag("use_bias"),
            "time_step_rank": rank,
            "time_step_min": facts.number("time_step_min"),
            "time_step_max": facts.number("time_step_max"),
            "time_step_floor": facts.number("time_step_floor"),
        },
    )


def _rank(facts: Facts, hidden: int) -> int:
    """Channels that the time steps come from; `auto` is a sixteenth of hidden_size."""
    return default_rank(hidden) if facts.get("time_step_rank") == "auto" else int(facts.integer("time_step_rank"))


def default_rank(hidden: int) -> int:
    """What `time_step_rank: auto` means."""
    return math.ceil(hidden / 16)


def native_config(model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the stock `mamba` checkpoint of this description; see `Family.native_config`."""
    layer = uniform_layer(model, (("lift", "mixer.lift_gamma", "lift_keys"),))
    expand = layer.value_dim / model.hidden_size
    wanted: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "expand": int(expand) if expand.is_integer() else expand,
        "state_size": layer.key_dim,
        "num_hidden_layers": len(model.layers),
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.norm_eps,
        "residual_in_fp32": model.residual_in_fp32,
        "tie_word_embeddings": model.tie_word_embeddings,
        "conv_kernel": model.mixer["conv_size"],
        "use_conv_bias": model.mixer["conv_bias"],
        **{key: model.mixer[key] for key in ("use_bias", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor")},
    }
    if not source:
        return {"model_type": "mamba", "architectures": ["MambaForCausalLM"], **wanted}
    if source.get("time_step_rank", "auto") in (None, "auto") and model.mixer["time_step_rank"] == default_rank(model.hidden_size):
        del wanted["time_step_rank"]
    return changed_keys(source, DEFAULTS, wanted)


def _inner(layer: LayerDescription) -> int:
    return layer.value_dim


def _has_bias(model: ModelDescription, layer: LayerDescription) -> bool:
    return bool(model.mixer["use_bias"])


def _has_conv_bias(model: ModelDescription, layer: LayerDescription) -> bool:
    return bool(model.mixer["conv_bias"])


def _selected(model: ModelDescription, layer: LayerDescription) -> int:
    """Rows of `x_proj`, laid out `[dt | B | C]`."""
    return int(model.mixer["time_step_rank"]) + 2 * layer.key_dim


MAMBA = Family(
    name="mamba",
    describe=describe,
    native_config=native_config,
    layer_tensors=(
        TensorSpec("mixer_norm.weight", lambda m, l: (m.hidden_size,), "norm", Init("ones")),
        TensorSpec("mixer.in_proj.weight", lambda m, l: (2 * _inner(l), m.hidden_size), "projection", LINEAR),
        TensorSpec("mixer.in_proj.bias", lambda m, l: (2 * _inner(l),), "bias", Init("zeros"), _has_bias),
        TensorSpec("mixer.conv1d.weight", lambda m, l: (_inner(l), 1, m.mixer["conv_size"]), "conv", LINEAR),
        TensorSpec("mixer.conv1d.bias", lambda m, l: (_inner(l),), "bias", Init("zeros"), _has_conv_bias),
        TensorSpec("mixer.x_proj.weight", lambda m, l: (_selected(m, l), _inner(l)), "projection", LINEAR),
        # Kaiming's bound at a = √5 is rank^-½, which is transformers' for this tensor.
        TensorSpec("mixer.dt_proj.weight", lambda m, l: (_inner(l), m.mixer["time_step_rank"]), "decay", LINEAR),
        TensorSpec("mixer.dt_proj.bias", lambda m, l: (_inner(l),), "decay", Init("mamba_dt_bias")),
        TensorSpec("mixer.A_log", lambda m, l: (_inner(l), l.key_dim), "decay", Init("s4d_real")),
        TensorSpec("mixer.D", lambda m, l: (_inner(l),), "decay", Init("ones")),
        TensorSpec("mixer.out_proj.weight", lambda m, l: (m.hidden_size, _inner(l)), "projection", LINEAR),
        TensorSpec("mixer.out_proj.bias", lambda m, l: (m.hidden_size,), "bias", Init("zeros"), _has_bias),
        TensorSpec("mixer.lift_gamma", lambda m, l: (1, (l.lift - 1) * l.key_dim), "lift", Init("ones"), lambda m, l: l.lift > 1),
        TensorSpec("mixer.spectrum_rho", lambda m, l: (_inner(l),), "decay", Init("zeros"), lambda m, l: l.spectrum == "learned"),
    ),
    operators=("widen_state", "lift_keys", "extend_spectrum"),
    default_operator="widen_state",
    default_layers="all",
    default_factor=4,
    adaptable=("in_proj", "x_proj", "out_proj"),
)
