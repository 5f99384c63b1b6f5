"""Load any checkpoint that statex reads, native or expanded, into the one backbone. No file is written."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from ..checkpoints import canonical_config, open_checkpoint
from .configuration import StatexConfig
from .modeling import StatexForCausalLM
from .named import parse_dtype, pick_device


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
) -> StatexForCausalLM:
    """A model in evaluation mode, read tensor by tensor: memory stays at the model's own size.

    Args:
        path_or_hub_id: a folder or a hub id, in any dialect or expanded by statex.
        dtype: of the weights, torch's or its name (`bfloat16`, `bf16` ...); by default, and with `auto`, as stored. Decay
            parameters are fp32 at least.
        device: where to put them; by default the CPU.
        backend: kernels of the recurrences: `auto`, `reference`, `chunked` or `triton`; see `set_backend`.
    Raises:
        CheckpointError: the checkpoint cannot be read, or a tensor is missing, superfluous or not of the shape its config says.
        StatexError: a dtype that is not float64, float32, float16 or bfloat16, or a device that is not there.
        ValueError: unknown backend.
    """
    wanted, place = parse_dtype(None if dtype == "auto" else dtype), pick_device(device or "cpu")
    with open_checkpoint(path_or_hub_id) as checkpoint:
        config = StatexConfig.from_dict(canonical_config(checkpoint))
        config.name_or_path = str(path_or_hub_id)
        stored = checkpoint.tensors["model.embeddings.weight"].torch_dtype
        model = StatexForCausalLM.empty(config, dtype=wanted or stored, device=place)
        with torch.no_grad():
            # The reader has checked names and shapes against the family's table, which lists exactly the model's parameters.
            for name, parameter in model.named_parameters():
                parameter.copy_(checkpoint.load(name))
        if (checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    model.set_backend(backend)
    return model


def converted(model: nn.Module, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
    """A loaded model in this dtype and on this device: itself where it is so already, else a copy, for it stays as it is.

    Args:
        dtype: of the weights, None for their own. What `load` keeps in fp32 at least stays so.
        device: None for the model's own.
    """
    strict = {name for module in model.modules() for name in getattr(module, "_keep_in_fp32_modules_strict", None) or ()}
    wide = re.compile(rf"(^|\.)({'|'.join(sorted(strict))})(\.|$)")
    weights = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
    kept = {name for name in weights if wide.search(name)}
    # `cuda` alone is no weight's device; that of a tensor there has its number.
    place = None if device is None else torch.empty(0, device=device).device
    same_dtype = all(dtype in (None, weight.dtype) for name, weight in weights.items() if name not in kept)
    if same_dtype and all(place in (None, weight.device) for weight in weights.values()):
        return model
    copied = copy.deepcopy(model).to(device=place, dtype=dtype)
    if dtype is not None:
        for name, weight in copied.named_parameters():
            if name in kept:
                weight.data = weights[name].detach().to(weight.device, torch.promote_types(dtype, torch.float32), copy=True)
    return copied
