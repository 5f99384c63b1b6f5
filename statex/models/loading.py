"""Load any checkpoint that statex reads, native or expanded, into the one backbone. No file is written."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from ..checkpoints import canonical_config, open_checkpoint
from .configuration import StatexConfig
from .modeling import StatexForCausalLM


def load(
    path_or_hub_id: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, backend: str = "auto"
) -> StatexForCausalLM:
    """A model in evaluation mode, read tensor by tensor: memory stays at the model's own size.

    Args:
        path_or_hub_id: a folder or a hub id, in any dialect or expanded by statex.
        dtype: of the weights; by default as stored. Decay parameters are fp32 at least.
        device: where to put them; by default the CPU.
        backend: kernels of the recurrences: `auto`, `reference`, `chunked` or `triton`; see `set_backend`.
    Raises:
        CheckpointError: the checkpoint cannot be read, or a tensor is missing, superfluous or not of the shape its config says.
        ValueError: unknown backend.
    """
    with open_checkpoint(path_or_hub_id) as checkpoint:
        config = StatexConfig.from_dict(canonical_config(checkpoint))
        config.name_or_path = str(path_or_hub_id)
        stored = checkpoint.tensors["model.embeddings.weight"].torch_dtype
        model = StatexForCausalLM.empty(config, dtype=dtype or stored, device=device or "cpu")
        with torch.no_grad():
            # The reader has checked names and shapes against the family's table, which lists exactly the model's parameters.
            for name, parameter in model.named_parameters():
                parameter.copy_(checkpoint.load(name))
        if (checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    model.set_backend(backend)
    return model
