"""Small checkpoints in every dialect, written from the families' own tables. Every tensor is random, biases and norms too: what
constructors set to zero or one hides wrong surgery and wrong loading."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from statex.checkpoints.dialects import dialect_of
from statex.families import ModelDescription, get_family

GLA_CONFIG: dict[str, Any] = {
    "model_type": "gla",
    "architectures": ["GLAForCausalLM"],
    "hidden_size": 32,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "num_kv_heads": None,
    "feature_map": None,
    "use_short_conv": False,
    "conv_size": 4,
    "use_output_gate": True,
    "clamp_min": None,
    "hidden_act": "swish",
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "fuse_norm": True,
    "tie_word_embeddings": False,
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DELTA_NET_CONFIG: dict[str, Any] = {
    "model_type": "delta_net",
    "architectures": ["DeltaNetForCausalLM"],
    "hidden_size": 32,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_heads": 4,
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
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GATED_DELTANET_CONFIG: dict[str, Any] = {
    "model_type": "gated_deltanet",
    "architectures": ["GatedDeltaNetForCausalLM"],
    "hidden_size": 32,
    "head_dim": 8,
    "expand_v": 1.5,
    "num_heads": 4,
    "num_v_heads": None,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "use_gate": True,
    "output_gate_activation": "swish",
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

HGRN_CONFIG: dict[str, Any] = {
    "model_type": "hgrn",
    "architectures": ["HGRNForCausalLM"],
    "attn_mode": "fused_recurrent",
    "hidden_size": 32,
    "expand_ratio": 1,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "use_short_conv": False,
    "conv_size": 4,
    "use_lower_bound": True,
    "hidden_act": "swish",
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

HGRN2_CONFIG: dict[str, Any] = HGRN_CONFIG | {
    "model_type": "hgrn2",
    "architectures": ["HGRN2ForCausalLM"],
    "attn_mode": "chunk",
    "expand_ratio": 8,
    "num_heads": 4,
}

MAMBA_CONFIG: dict[str, Any] = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "hidden_size": 32,
    "expand": 2,
    "intermediate_size": 64,
    "state_size": 8,
    "time_step_rank": 3,
    "num_hidden_layers": 3,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
    "vocab_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

MAMBA1_SSM_CONFIG: dict[str, Any] = {
    "d_model": 32,
    "n_layer": 3,
    "vocab_size": 43,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
}
"""As released: sizes that are mamba_ssm's defaults go without saying."""

MAMBA2_CONFIG: dict[str, Any] = {
    "model_type": "mamba2",
    "architectures": ["Mamba2ForCausalLM"],
    "hidden_size": 32,
    "expand": 2,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 1,
    "state_size": 8,
    "num_hidden_layers": 3,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
    "vocab_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

MAMBA_SSM_CONFIG: dict[str, Any] = {
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 3,
    "vocab_size": 43,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def write_gla(
    path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, conv_bias: bool = False, **overrides: Any
) -> Path:
    """fla's `gla`; config keys by name. Conv biases have no key: fla's layer takes them, and its config cannot say so."""
    return _write_fla(Path(path), GLA_CONFIG | overrides, dtype, seed, conv_bias)


def write_delta_net(
    path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, conv_bias: bool = False, **overrides: Any
) -> Path:
    """fla's `delta_net`; config keys by name. Conv biases as in `write_gla`."""
    return _write_fla(Path(path), DELTA_NET_CONFIG | overrides, dtype, seed, conv_bias)


def write_gated_deltanet(
    path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, conv_bias: bool = False, **overrides: Any
) -> Path:
    """fla's `gated_deltanet`; config keys by name. Conv biases as in `write_gla`."""
    return _write_fla(Path(path), GATED_DELTANET_CONFIG | overrides, dtype, seed, conv_bias)


def write_hgrn(
    path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, conv_bias: bool = False, **overrides: Any
) -> Path:
    """fla's `hgrn`; config keys by name. Conv biases as in `write_gla`."""
    return _write_fla(Path(path), HGRN_CONFIG | overrides, dtype, seed, conv_bias)


def write_hgrn2(
    path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, conv_bias: bool = False, **overrides: Any
) -> Path:
    """fla's `hgrn2`; config keys by name. Conv biases as in `write_gla`."""
    return _write_fla(Path(path), HGRN2_CONFIG | overrides, dtype, seed, conv_bias)


def _write_fla(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, seed: int, conv_bias: bool) -> Path:
    model = get_family(config["model_type"]).describe(config, {})
    model.mixer["conv_bias"] = conv_bias
    return _write_safetensors(folder, config, _random_tensors("fla", model, config, dtype, seed))


def write_mamba2(path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """transformers' `mamba2`; config keys by name."""
    return _write_mamba(Path(path), MAMBA2_CONFIG | overrides, dtype, seed)


def write_mamba(path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """transformers' `mamba`; config keys by name."""
    return _write_mamba(Path(path), MAMBA_CONFIG | overrides, dtype, seed)


def _write_mamba(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, seed: int) -> Path:
    native = _random_tensors("transformers", get_family(config["model_type"]).describe(config, {}), config, dtype, seed)
    return _write_safetensors(folder, config, native)


def write_mamba_ssm(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ssm_cfg: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """state-spaces' Mamba-2 as `pytorch_model.bin`, a tied head sharing the embedding's storage; `ssm_cfg` adds keys."""
    return _write_state_spaces(Path(path), "mamba2", MAMBA_SSM_CONFIG | overrides, ssm_cfg or {}, dtype, seed)


def write_mamba1_ssm(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ssm_cfg: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """state-spaces' Mamba, as `write_mamba_ssm`."""
    return _write_state_spaces(Path(path), "mamba", MAMBA1_SSM_CONFIG | overrides, ssm_cfg or {}, dtype, seed)


def _write_state_spaces(
    folder: Path, family: str, config: dict[str, Any], ssm_cfg: Mapping[str, Any], dtype: torch.dtype, seed: int
) -> Path:
    config["ssm_cfg"] = config["ssm_cfg"] | dict(ssm_cfg)
    model = get_family(family).describe(dialect_of("mamba_ssm", family).to_family(config), {})
    native = _random_tensors("mamba_ssm", model, config, dtype, seed)
    native.setdefault("lm_head.weight", native["backbone.embedding.weight"])
    _write_config(folder, config)
    torch.save(native, folder / "pytorch_model.bin")
    return folder


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values of a trained model's size: activations stay near one, decays forget within tens of tokens, nothing is 0 or 1."""
    if name.endswith("norm.weight"):
        return 0.7 + 0.6 * torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.log(1 + 3 * torch.rand(shape, generator=generator))
    if name.endswith("lower_bounds"):
        return 2 * torch.randn(shape, generator=generator)
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return -3 + 2 * torch.rand(shape, generator=generator)
    if name.endswith(("gk_proj.1.bias", "mixer.D")):
        return 0.5 + torch.rand(shape, generator=generator)
    if len(shape) == 1:
        return 0.2 * torch.randn(shape, generator=generator)
    if name.endswith("embeddings.weight"):
        return torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


def _random_tensors(
    dialect_name: str, model: ModelDescription, config: Mapping[str, Any], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    dialect, generator = dialect_of(dialect_name, model.family), torch.Generator().manual_seed(seed)
    variants = dialect.default_variants(config)
    native = {}
    for name, (shape, _role) in get_family(model.family).tensors(model).items():
        native_name = dialect.to_native(name, variants)
        assert native_name is not None
        native[native_name] = random_tensor(name, shape, generator).to(dtype)
    return native


def _write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _write_safetensors(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    _write_config(folder, config)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


WRITERS: dict[str, Callable[..., Path]] = {
    "gla (fla)": write_gla,
    "delta_net (fla)": write_delta_net,
    "gated_deltanet (fla)": write_gated_deltanet,
    "mamba2 (transformers)": write_mamba2,
    "mamba2 (mamba_ssm)": write_mamba_ssm,
    "hgrn (fla)": write_hgrn,
    "hgrn2 (fla)": write_hgrn2,
    "mamba (transformers)": write_mamba,
    "mamba (mamba_ssm)": write_mamba1_ssm,
}
"""One writer per family and dialect, for tests that run over all of them."""
