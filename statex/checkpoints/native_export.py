"""Write a checkpoint that the family's own software loads with no code of ours: a stock `gla`, `mamba2` or mamba_ssm one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ExportError
from ..families.description import ModelDescription
from .bin_writer import write_bin
from .dialects import Dialect, dialect_of
from .reader import Checkpoint, open_checkpoint
from .writer import CheckpointWriter, OutputFolder

if TYPE_CHECKING:
    from torch import Tensor

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_native(path: str | Path, out: str | Path, *, dialect: str | None = None, force: bool = False) -> list[str]:
    """Write the stock checkpoint of this model: the source's own config keys and tensor names, changed only where the model is.

    A checkpoint that was imported and not changed comes back with every tensor (name, dtype, shape, bytes) and config key.

    Args:
        path: a checkpoint folder or hub id, expanded or not.
        out: the folder to write.
        dialect: `fla`, `transformers` or `mamba_ssm`; default: the one that the checkpoint came from.
        force: replace `out` if it exists.
    Returns:
        What to know before running it: limits of the software that will.
    Raises:
        ExportError: no stock checkpoint can hold this model; says which layers and tensors are the reason.
        CheckpointError: the source cannot be read, or `out` cannot be written.
    """
    with open_checkpoint(path) as checkpoint:
        try:
            target = dialect_of(dialect or checkpoint.dialect, checkpoint.family.name)
        except CheckpointError as error:
            raise ExportError(error.what, fix=error.fix) from error
        config = _config(checkpoint, target)
        names = _names(checkpoint, target, config)
        write = _write_bin if target.weights == "bin" else _write_safetensors
        write(checkpoint, names, config, Path(out), force)
        return _warnings(checkpoint, target, config)


def _config(checkpoint: Checkpoint, target: Dialect) -> dict[str, Any]:
    family, description = checkpoint.family, checkpoint.description
    origin = dialect_of(checkpoint.dialect, family.name)
    source = origin.to_family(checkpoint.source_config) if checkpoint.source_config else {}
    if source and target.name == checkpoint.dialect:
        config = target.from_family(family.native_config(description, source), checkpoint.source_config)
    else:
        # Another dialect has other defaults, so everything is spelt out; the source's further keys (token ids) stay.
        config = target.from_family(source | family.native_config(description, {}), None)
    if not source:  # a model that never was a native checkpoint has its token ids in its own config only
        config |= {key: value for key in TOKEN_IDS if (value := checkpoint.config.get(key)) is not None}
    if checkpoint.is_canonical:
        _set_dtype(config, checkpoint.tensors["model.embeddings.weight"].dtype)
    return config


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Training may have changed the dtype that the source's config names."""
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None:
            config[key] = dtype


def _names(checkpoint: Checkpoint, target: Dialect, config: Mapping[str, Any]) -> dict[str, str]:
    """Canonical name by native name, in the checkpoint's order."""
    known = checkpoint.source_tensors if target.name == checkpoint.dialect else {}
    flags = target.default_variants(config) | known
    names = {}
    for name in checkpoint.tensors:
        native = target.to_native(name, flags)
        if native is None:
            raise ExportError(f"{target.name} has no name for the tensor {name}", fix="Export with --to hf, which carries the code")
        names[native] = name
    # mamba_ssm's own files hold the tied head too, and its loader asks for it.
    if checkpoint.description.tie_word_embeddings and flags.get("lm_head", target.weights == "bin"):
        names["lm_head.weight"] = "model.embeddings.weight"
    return names


def _write_safetensors(checkpoint: Checkpoint, names: Mapping[str, str], config: Mapping[str, Any], out: Path, force: bool) -> None:
    declared = {native: checkpoint.tensors[name] for native, name in names.items()}
    with CheckpointWriter(out, declared, metadata=_metadata(checkpoint), force=force, protect=[checkpoint.path]) as writer:
        for native, name in names.items():
            writer.add(native, _load(checkpoint, name))
        writer.finish(config, checkpoint.carried_files)


def _write_bin(checkpoint: Checkpoint, names: Mapping[str, str], config: Mapping[str, Any], out: Path, force: bool) -> None:
    heads = {"lm_head.weight"} if checkpoint.description.tie_word_embeddings else set()
    embedding = next(native for native, name in names.items() if name == "model.embeddings.weight" and native not in heads)
    tensors = {native: checkpoint.tensors[name] for native, name in names.items() if native not in heads}
    need = sum(info.nbytes for info in tensors.values())
    # Twice: a scratch copy lies beside the file until it is complete.
    with OutputFolder(out, force=force, need=2 * need, protect=[checkpoint.path]) as output:
        write_bin(
            output, tensors, lambda native: _load(checkpoint, names[native]), {head: embedding for head in heads if head in names}
        )
        output.copy(checkpoint.carried_files)
        output.write_config(config)
        output.publish()


def _load(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as the stock checkpoint holds it."""
    factors, within = checkpoint.family.native_factors(checkpoint.description), name.split(".", 3)[-1]
    tensor = checkpoint.load(name)
    return tensor * factors[within] if within in factors else tensor


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Provenance for the header; a checkpoint without any keeps a plain one."""
    provenance = checkpoint.provenance
    return {"statex_provenance": json.dumps(provenance, sort_keys=True, default=str)} if provenance else {}


def _warnings(checkpoint: Checkpoint, target: Dialect, config: Mapping[str, Any]) -> list[str]:
    notes = _RUNTIME_NOTES[target.family](checkpoint.description)
    if "auto_map" in config:
        notes.append("config.json names modelling code (auto_map) that is not carried along: load without trust_remote_code")
    if checkpoint.dialect == "mamba_ssm" and target.name == "transformers":
        notes.append("state-spaces configs name no special tokens: set eos_token_id in config.json (0 with the GPT-NeoX tokenizer)")
    return notes


def _gla_notes(model: ModelDescription) -> list[str]:
    notes = []
    if model.mixer["gate_low_rank_dim"] != 16:
        notes.append(
            f"fla's gla has gate projections of rank 16, and no config key for the {model.mixer['gate_low_rank_dim']} of this model"
        )
    if model.mixer["conv_bias"]:
        notes.append("fla's gla config cannot ask for the convolution biases that this model has: fla would leave them out")
    return notes


def _mamba2_notes(model: ModelDescription) -> list[str]:
    d_state, groups = model.layers[0].key_dim, model.layers[0].key_heads
    notes = []
    if d_state not in (128, 256):
        notes.append(f"llama.cpp's CUDA scan takes a d_state of 128 or 256, and this model has {d_state}")
    if groups > 1:
        notes.append(f"transformers before 5.23 norms over all channels instead of each of the {groups} groups: use 5.23 or later")
    return notes


def _delta_rule_notes(model: ModelDescription) -> list[str]:
    key_dim = model.layers[0].key_dim
    notes = []
    if key_dim > 256:
        notes.append(f"fla's chunked delta rule stops at keys of 256 channels, and this model has {key_dim}: statex runs it")
    if model.mixer["conv_bias"]:
        notes.append(
            f"fla's {model.family} config cannot ask for the convolution biases that this model has: fla would leave them out"
        )
    return notes


def _hgrn_notes(model: ModelDescription) -> list[str]:
    if model.mixer["use_short_conv"] and model.mixer["conv_bias"]:
        return [f"fla's {model.family} config cannot ask for the convolution biases that this model has: fla would leave them out"]
    return []


def _mamba_notes(model: ModelDescription) -> list[str]:
    d_state = model.layers[0].key_dim
    if d_state > 256:
        return [f"mamba_ssm's CUDA scan takes a d_state of 256 at most, and this model has {d_state}"]
    return []


_RUNTIME_NOTES: dict[str, Callable[[ModelDescription], list[str]]] = {
    "gla": _gla_notes,
    "mamba2": _mamba2_notes,
    "delta_net": _delta_rule_notes,
    "gated_deltanet": _delta_rule_notes,
    "hgrn": _hgrn_notes,
    "hgrn2": _hgrn_notes,
    "mamba": _mamba_notes,
}
"""What to know, by family, before a stock checkpoint is run."""
