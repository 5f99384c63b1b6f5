"""The config of state-spaces' original Mamba-2 (mamba_ssm), translated to transformers' keys and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, ExportError
from ..families.facts import MEND

TOP_KEYS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
}
"""mamba_ssm's name -> the family's."""

SSM_KEYS = {
    "d_state": "state_size",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "expand": "expand",
    "d_conv": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
    "chunk_size": "chunk_size",
}
"""The same inside `ssm_cfg`."""

DEFAULTS: dict[str, Any] = {
    "d_state": 128,
    "headdim": 64,
    "ngroups": 1,
    "expand": 2,
    "d_conv": 4,
    "bias": False,
    "conv_bias": True,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init_floor": 1e-4,
    "dt_limit": [0.0, float("inf")],
    "chunk_size": 256,
    "residual_in_fp32": True,
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 8,
}
"""What mamba_ssm's `MambaConfig` and `Mamba2` assume when a key is absent."""

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


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this is a mamba_ssm config of a Mamba-2 model."""
    ssm = config.get("ssm_cfg")
    return isinstance(ssm, dict) and ssm.get("layer") == "Mamba2"


def to_family(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config in transformers' keys.

    Raises:
        CheckpointError: a required key is missing, or an option is set that the family does not have.
    """
    ssm = config["ssm_cfg"]
    for key, only in ONLY.items():
        value = ssm.get(key, config.get(key, only))
        if value != only:
            raise CheckpointError(
                f"{key} = {value!r} is not supported in a state-spaces config", where="config.json", fix=f"Only {only!r} is"
            )
    multiple, expand = _said(config, "pad_vocab_size_multiple"), _said(ssm, "expand")
    wholes = {key: config.get(key) for key in ("d_model", "n_layer", "vocab_size")} | {"pad_vocab_size_multiple": multiple}
    missing = [key for key, value in wholes.items() if not isinstance(value, int) or value < 1]
    if not isinstance(expand, (int, float)) or not 0 < expand < math.inf:
        missing.append("expand")
    if missing:
        what = f"the state-spaces config lacks a positive number for: {', '.join(missing)}"
        raise CheckpointError(what, where="config.json", fix=MEND)
    family: dict[str, Any] = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
    family |= {theirs: _said(config, key) for key, theirs in TOP_KEYS.items()}
    family |= {theirs: _said(ssm, key) for key, theirs in SSM_KEYS.items()}
    inner, head_dim = family["hidden_size"] * family["expand"], family["head_dim"]
    if not isinstance(head_dim, int) or head_dim < 1 or inner % head_dim:
        what = f"d_model * expand ({inner}) is not a multiple of headdim ({head_dim})"
        raise CheckpointError(what, where="config.json", fix=MEND)
    # The embedding has this many rows; the config may give the unpadded number.
    family["vocab_size"] = -(-config["vocab_size"] // multiple) * multiple
    family["num_heads"] = int(inner // head_dim)
    # transformers would fill in ids of another tokenizer.
    family |= {"layer_norm_epsilon": NORM_EPS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return family


def _said(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return DEFAULTS.get(key) if value is None else value


def from_family(family: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, Any]:
    """mamba_ssm's config for a config in transformers' keys.

    Args:
        source: the mamba_ssm config that the model came from; only keys whose meaning changed are rewritten. None: a fresh config.
    Raises:
        ExportError: mamba_ssm fixes what this config sets.
    """
    epsilon = family.get("layer_norm_epsilon", NORM_EPS)
    if epsilon != NORM_EPS:
        what = f"mamba_ssm's norms add {NORM_EPS:g}, while this model has layer_norm_epsilon = {epsilon:g}"
        raise ExportError(what, fix="Export with --dialect transformers")
    if source is None:
        padded = next(multiple for multiple in (16, 8, 1) if family["vocab_size"] % multiple == 0)
        config: dict[str, Any] = {
            "d_intermediate": 0,
            "vocab_size": family["vocab_size"],
            "ssm_cfg": {"layer": "Mamba2", "d_state": family.get("state_size", DEFAULTS["d_state"])},
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": padded,
        }
        old: dict[str, Any] = {theirs: DEFAULTS[key] for key, theirs in SSM_KEYS.items()}
    else:
        config, old = copy.deepcopy(dict(source)), to_family(source)
    for keys, target in ((TOP_KEYS, config), (SSM_KEYS, config["ssm_cfg"])):
        target |= {key: family[theirs] for key, theirs in keys.items() if theirs in family and family[theirs] != old.get(theirs)}
    if source is not None and family["vocab_size"] != old["vocab_size"]:
        config["vocab_size"] = family["vocab_size"]
    return config
