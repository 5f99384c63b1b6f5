"""Mamba-2 (arXiv 2405.21060), in transformers' config keys: model type `mamba2`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, ExportError
from .base import Family, Init, Shape, TensorSpec
from .description import LayerDescription, ModelDescription
from .facts import MEND, Facts, as_number, changed_keys, divide, uniform_layer

DEFAULTS: dict[str, Any] = {
    "num_heads": 128,
    "head_dim": 64,
    "vocab_size": 32768,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "residual_in_fp32": True,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "time_step_limit": [0.0, math.inf],
    "tie_word_embeddings": False,
}
"""What transformers' `Mamba2Config` assumes when a key is absent."""

LINEAR = Init("kaiming_uniform", (("a", math.sqrt(5)),))
RESIDUAL = Init("kaiming_uniform", (("a", math.sqrt(5)), ("depth_power", -0.5)))


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelDescription:
    """The description of a `mamba2` checkpoint; see `Family.describe`."""
    facts = Facts(config, DEFAULTS, shapes)
    if facts.get("hidden_act") not in ("silu", "swish"):
        raise CheckpointError(
            f"hidden_act {facts.get('hidden_act')!r} is not supported", where="config.json", fix="Supported: silu"
        )
    hidden, heads, head_dim = facts.integer("hidden_size"), facts.integer("num_heads"), facts.integer("head_dim")
    groups, state = facts.integer("n_groups"), facts.integer("state_size")
    inner = heads * head_dim
    expanded = hidden * facts.number("expand")
    if not math.isclose(expanded, inner):
        raise CheckpointError(
            f"num_heads * head_dim ({heads} * {head_dim} = {inner}) must equal hidden_size * expand ({expanded:g})",
            where="config.json",
            fix=MEND,
        )
    divide(heads, groups, f"num_heads ({heads}) must be a multiple of n_groups ({groups})")
    mixer = "model.layers.0.mixer"
    facts.agree("hidden_size", hidden, "model.embeddings.weight", 1)
    facts.agree("vocab_size", facts.integer("vocab_size"), "model.embeddings.weight", 0)
    facts.agree("num_heads", heads, f"{mixer}.A_log", 0)
    facts.agree("num_heads * head_dim", inner, f"{mixer}.out_proj.weight", 1)
    facts.agree(
        f"num_heads * head_dim + 2 * n_groups ({groups}) * state_size ({state})",
        inner + 2 * groups * state,
        f"{mixer}.conv1d.weight",
        0,
    )
    facts.agree("conv_kernel", facts.integer("conv_kernel"), f"{mixer}.conv1d.weight", 2)
    layer = LayerDescription(
        query_heads=groups,
        key_heads=groups,
        value_heads=heads,
        key_dim=state,
        value_dim=head_dim,
        scale=1.0,
        norm_groups=groups,
    )
    return ModelDescription(
        family="mamba2",
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
            "time_step_limit": _time_step_limit(facts.get("time_step_limit")),
            "time_step_min": facts.number("time_step_min"),
            "time_step_max": facts.number("time_step_max"),
            "time_step_floor": facts.number("time_step_floor"),
        },
    )


def _time_step_limit(value: Any) -> list[float | None]:
    """`[low, high]` of the step after softplus; an infinite `high` is None, which strict JSON can hold."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise CheckpointError(f"time_step_limit must be two numbers, not {value!r}", where="config.json", fix=MEND)
    low, high = (math.inf if limit is None else as_number("time_step_limit", limit) for limit in value)
    return [low, None if math.isinf(high) else high]


def native_config(model: ModelDescription, source: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the stock `mamba2` checkpoint of this description; see `Family.native_config`."""
    layer = uniform_layer(model, (("lift", "mixer.lift_gamma", "lift_keys"), ("mixing", "mixer.mixing", "merge_heads")))
    stock = {"scale": 1.0, "norm_groups": layer.key_heads, "query_heads": layer.key_heads, "blocks": 1}
    for field, value in stock.items():
        if not math.isclose(getattr(layer, field), value):
            what = f"the layers have {field} = {getattr(layer, field):g}, while a stock mamba2 layer has {value:g}"
            raise ExportError(what, fix="Export with --to hf, which carries the code")
    inner = layer.value_heads * layer.value_dim
    expand = inner / model.hidden_size
    wanted: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "num_heads": layer.value_heads,
        "head_dim": layer.value_dim,
        "expand": int(expand) if expand.is_integer() else expand,
        "n_groups": layer.key_heads,
        "state_size": layer.key_dim,
        "num_hidden_layers": len(model.layers),
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.norm_eps,
        "residual_in_fp32": model.residual_in_fp32,
        "tie_word_embeddings": model.tie_word_embeddings,
        "conv_kernel": model.mixer["conv_size"],
        "use_conv_bias": model.mixer["conv_bias"],
        **{key: model.mixer[key] for key in ("use_bias", "time_step_min", "time_step_max", "time_step_floor")},
    }
    if _time_step_limit(source.get("time_step_limit") or DEFAULTS["time_step_limit"]) != model.mixer["time_step_limit"]:
        wanted["time_step_limit"] = [math.inf if limit is None else limit for limit in model.mixer["time_step_limit"]]
    if not source:
        return {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], **wanted}
    return changed_keys(source, DEFAULTS, wanted)


def _inner(layer: LayerDescription) -> int:
    return layer.value_heads * layer.value_dim


def _conv_channels(layer: LayerDescription) -> int:
    """Channels of the convolution, laid out `[x | B | C]`."""
    return _inner(layer) + 2 * layer.key_heads * layer.key_dim


def _projected(layer: LayerDescription) -> int:
    """Rows of `in_proj`, laid out `[z | x | B | C | dt]`."""
    return _inner(layer) + _conv_channels(layer) + layer.value_heads


def _has_bias(model: ModelDescription, layer: LayerDescription) -> bool:
    return bool(model.mixer["use_bias"])


def _has_conv_bias(model: ModelDescription, layer: LayerDescription) -> bool:
    return bool(model.mixer["conv_bias"])


MAMBA2 = Family(
    name="mamba2",
    describe=describe,
    native_config=native_config,
    layer_tensors=(
        TensorSpec("mixer_norm.weight", lambda m, l: (m.hidden_size,), "norm", Init("ones")),
        TensorSpec("mixer.in_proj.weight", lambda m, l: (_projected(l), m.hidden_size), "projection", LINEAR),
        TensorSpec("mixer.in_proj.bias", lambda m, l: (_projected(l),), "bias", Init("zeros"), _has_bias),
        TensorSpec("mixer.conv1d.weight", lambda m, l: (_conv_channels(l), 1, m.mixer["conv_size"]), "conv", LINEAR),
        TensorSpec("mixer.conv1d.bias", lambda m, l: (_conv_channels(l),), "bias", Init("zeros"), _has_conv_bias),
        TensorSpec("mixer.dt_bias", lambda m, l: (l.value_heads,), "decay", Init("mamba_dt_bias")),
        TensorSpec("mixer.A_log", lambda m, l: (l.value_heads,), "decay", Init("mamba_A_log", (("low", 1.0), ("high", 16.0)))),
        TensorSpec("mixer.D", lambda m, l: (l.value_heads,), "decay", Init("ones")),
        TensorSpec("mixer.norm.weight", lambda m, l: (_inner(l),), "norm", Init("ones")),
        TensorSpec("mixer.out_proj.weight", lambda m, l: (m.hidden_size, _inner(l)), "projection", RESIDUAL),
        TensorSpec("mixer.out_proj.bias", lambda m, l: (m.hidden_size,), "bias", Init("zeros"), _has_bias),
        TensorSpec(
            "mixer.lift_gamma", lambda m, l: (l.key_heads, (l.lift - 1) * l.key_dim), "lift", Init("ones"), lambda m, l: l.lift > 1
        ),
        TensorSpec(
            "mixer.spectrum_rho", lambda m, l: (l.value_heads,), "decay", Init("zeros"), lambda m, l: l.spectrum == "learned"
        ),
    ),
    operators=("widen_state", "lift_keys", "extend_spectrum"),
    default_operator="widen_state",
    default_layers="all",
    default_factor=4,
    adaptable=("in_proj", "out_proj"),
)
