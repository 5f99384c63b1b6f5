"""The configs of state-spaces' original Mamba and Mamba-2 (mamba_ssm), translated to transformers' keys and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, ExportError
from ..families.facts import MEND
from ..families.mamba import default_rank

TOP_KEYS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
}
"""mamba_ssm's name -> the family's."""

TOP_DEFAULTS: dict[str, Any] = {"residual_in_fp32": True, "tie_embeddings": True, "pad_vocab_size_multiple": 8}
"""What mamba_ssm's `MambaConfig` assumes when a key is absent."""

_SHARED_KEYS = {
    "d_state": "state_size",
    "expand": "expand",
    "d_conv": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
}
_SHARED_DEFAULTS: dict[str, Any] = {
    "expand": 2,
    "d_conv": 4,
    "bias": False,
    "conv_bias": True,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init_floor": 1e-4,
}


@dataclass(frozen=True)
class Layer:
    """One of mamba_ssm's mixers.

    Attributes:
        name: in `ssm_cfg`, where Mamba1 goes without saying.
        architecture: transformers' class for it.
        keys: name in `ssm_cfg` -> the family's. defaults: what the mixer assumes when one is absent.
    """

    name: str
    architecture: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]


LAYERS = {
    "mamba": Layer(
        name="Mamba1",
        architecture="MambaForCausalLM",
        keys=_SHARED_KEYS | {"dt_rank": "time_step_rank"},
        defaults=_SHARED_DEFAULTS | {"d_state": 16, "dt_rank": "auto"},
    ),
    "mamba2": Layer(
        name="Mamba2",
        architecture="Mamba2ForCausalLM",
        keys=_SHARED_KEYS
        | {"headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "time_step_limit", "chunk_size": "chunk_size"},
        defaults=_SHARED_DEFAULTS
        | {"d_state": 128, "headdim": 64, "ngroups": 1, "dt_limit": [0.0, float("inf")], "chunk_size": 256},
    ),
}
"""By family."""

ONLY: dict[str, Any] = {
    "rms_norm": True,
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "d_ssm": None,
    "activation": "swish",
}
"""Keys (of either level) of which only this value, also the default, is supported."""

NORM_EPS = 1e-5
"""mamba_ssm's norms; no config key reaches it."""


def matches(family: str, config: Mapping[str, Any]) -> bool:
    """Whether this is a mamba_ssm config of a model of that family."""
    ssm = config.get("ssm_cfg")
    return isinstance(ssm, dict) and "model_type" not in config and ssm.get("layer", "Mamba1") == LAYERS[family].name


def to_family(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config in transformers' keys.

    Raises:
        CheckpointError: a required key is missing, or an option is set that the family does not have.
    """
    ssm, layer = config["ssm_cfg"], LAYERS[family]
    for key, only in ONLY.items():
        value = ssm.get(key, config.get(key, only))
        if value != only:
            raise CheckpointError(
                f"{key} = {value!r} is not supported in a state-spaces config", where="config.json", fix=f"Only {only!r} is"
            )
    multiple, expand = _said(config, "pad_vocab_size_multiple", TOP_DEFAULTS), _said(ssm, "expand", layer.defaults)
    wholes = {key: config.get(key) for key in ("d_model", "n_layer", "vocab_size")} | {"pad_vocab_size_multiple": multiple}
    missing = [key for key, value in wholes.items() if not isinstance(value, int) or value < 1]
    if not isinstance(expand, (int, float)) or not 0 < expand < math.inf:
        missing.append("expand")
    if missing:
        what = f"the state-spaces config lacks a positive number for: {', '.join(missing)}"
        raise CheckpointError(what, where="config.json", fix=MEND)
    found: dict[str, Any] = {"model_type": family, "architectures": [layer.architecture]}
    found |= {theirs: _said(config, key, TOP_DEFAULTS) for key, theirs in TOP_KEYS.items()}
    found |= {theirs: _said(ssm, key, layer.defaults) for key, theirs in layer.keys.items()}
    # The embedding has this many rows; the config may give the unpadded number.
    found["vocab_size"] = -(-config["vocab_size"] // multiple) * multiple
    if family == "mamba2":
        found["num_heads"] = _heads(found)
    # transformers would fill in ids of another tokenizer.
    return found | {"layer_norm_epsilon": NORM_EPS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _heads(config: Mapping[str, Any]) -> int:
    inner, head_dim = config["hidden_size"] * config["expand"], config["head_dim"]
    if not isinstance(head_dim, int) or head_dim < 1 or inner % head_dim:
        what = f"d_model * expand ({inner}) is not a multiple of headdim ({head_dim})"
        raise CheckpointError(what, where="config.json", fix=MEND)
    return int(inner // head_dim)


def _said(config: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> Any:
    value = config.get(key)
    return defaults.get(key) if value is None else value


def from_family(family: str, wanted: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, Any]:
    """mamba_ssm's config for a config in transformers' keys.

    Args:
        wanted: the config in transformers' keys.
        source: the mamba_ssm config that the model came from; only keys whose meaning changed are rewritten. None: a fresh config.
    Raises:
        ExportError: mamba_ssm fixes what this config sets.
    """
    layer, epsilon = LAYERS[family], wanted.get("layer_norm_epsilon", NORM_EPS)
    if epsilon != NORM_EPS:
        what = f"mamba_ssm's norms add {NORM_EPS:g}, while this model has layer_norm_epsilon = {epsilon:g}"
        raise ExportError(what, fix="Export with --dialect transformers")
    if source is None:
        padded = next(multiple for multiple in (16, 8, 1) if wanted["vocab_size"] % multiple == 0)
        config: dict[str, Any] = {
            "d_intermediate": 0,
            "vocab_size": wanted["vocab_size"],
            "ssm_cfg": {"layer": layer.name, "d_state": wanted.get("state_size", layer.defaults["d_state"])},
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": padded,
        }
        old: dict[str, Any] = {theirs: layer.defaults[key] for key, theirs in layer.keys.items()}
    else:
        config, old = copy.deepcopy(dict(source)), to_family(family, source)
    if old.get("time_step_rank") == "auto" and wanted.get("time_step_rank") == default_rank(wanted["hidden_size"]):
        old["time_step_rank"] = wanted["time_step_rank"]
    for keys, target in ((TOP_KEYS, config), (layer.keys, config["ssm_cfg"])):
        target |= {key: wanted[theirs] for key, theirs in keys.items() if theirs in wanted and wanted[theirs] != old.get(theirs)}
    if source is not None and wanted["vocab_size"] != old["vocab_size"]:
        config["vocab_size"] = wanted["vocab_size"]
    return config
