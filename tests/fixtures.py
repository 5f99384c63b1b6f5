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

from statex.checkpoints.dialects import DIALECTS
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
    config = GLA_CONFIG | overrides

    def describe(config: Mapping[str, Any]) -> ModelDescription:
        model = get_family("gla").describe(config, {})
        model.mixer["conv_bias"] = conv_bias
        return model

    native = _random_tensors("fla", describe(config), config, dtype, seed)
    return _write_safetensors(Path(path), config, native)


def write_mamba2(path: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """transformers' `mamba2`; config keys by name."""
    config = MAMBA2_CONFIG | overrides
    native = _random_tensors("transformers", get_family("mamba2").describe(config, {}), config, dtype, seed)
    return _write_safetensors(Path(path), config, native)


def write_mamba_ssm(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ssm_cfg: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """state-spaces' Mamba-2 as `pytorch_model.bin`, a tied head sharing the embedding's storage; `ssm_cfg` adds keys."""
    config = MAMBA_SSM_CONFIG | overrides
    config["ssm_cfg"] = config["ssm_cfg"] | dict(ssm_cfg or {})
    family_config = DIALECTS["mamba_ssm"].to_family(config)
    native = _random_tensors("mamba_ssm", get_family("mamba2").describe(family_config, {}), config, dtype, seed)
    native.setdefault("lm_head.weight", native["backbone.embedding.weight"])
    folder = _write_config(Path(path), config)
    torch.save(native, folder / "pytorch_model.bin")
    return folder


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values of a trained model's size: activations stay near one, decays forget within tens of tokens, nothing is 0 or 1."""
    if name.endswith("norm.weight"):
        return 0.7 + 0.6 * torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.log(1 + 3 * torch.rand(shape, generator=generator))
    if name.endswith("dt_bias"):
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
    dialect, generator = DIALECTS[dialect_name], torch.Generator().manual_seed(seed)
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


WRITERS: dict[str, Callable[..., Path]] = {"fla": write_gla, "transformers": write_mamba2, "mamba_ssm": write_mamba_ssm}
"""One writer per dialect, for tests that run over all of them."""
