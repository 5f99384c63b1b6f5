"""Byte-level checkpoints, documents and recipes small enough to train in a test."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import ByT5Tokenizer

from statex.checkpoints import CheckpointWriter, TensorInfo, canonical_config, open_checkpoint
from statex.recipes import FinetuneResult, finetune
from statex.recipes.reporting import read_log
from statex.recipes.trainer import Trainer
from statex.surgery import expand_checkpoint
from tests.fixtures import write_gla, write_mamba2

VOCAB = 264
EOS = 1


def byte_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0)


def write_byte_gla(path: Path, **overrides: Any) -> Path:
    """A GLA of two layers with a byte tokenizer, in bf16 but for what a test overrides."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_heads": 2}
    write_gla(path, **{"dtype": torch.bfloat16} | sizes | overrides)
    byte_tokenizer().save_pretrained(path)
    return path


def write_byte_mamba2(path: Path) -> Path:
    """A Mamba-2 of two layers with a byte tokenizer."""
    write_mamba2(path, vocab_size=VOCAB, hidden_size=16, num_heads=4, num_hidden_layers=2)
    byte_tokenizer().save_pretrained(path)
    return path


def write_lifted(path: Path, base: Path) -> Path:
    """`base` with lifted keys in layer 0 (a new fp32 tensor), and layer 1's q_proj marked as expanded."""
    new, expanded = "model.layers.0.mixer.lift_gamma", "model.layers.1.mixer.q_proj.weight"
    with open_checkpoint(base) as source:
        config = canonical_config(source)
        layer = config["statex"]["description"]["layers"][0]
        layer["lift"] = 2
        config["statex"]["provenance"] = {"plan": {"operator": "lift_keys"}, "new": [new], "expanded": [expanded]}
        gamma = torch.zeros(layer["query_heads"], layer["key_dim"])
        with CheckpointWriter(path, {**source.tensors, new: TensorInfo(gamma.shape, gamma.dtype)}) as writer:
            for name in source.tensors:
                writer.add(name, source.load(name))
            writer.add(new, gamma)
            writer.finish(config, source.carried_files)
    return path


def write_widened(path: Path, base: Path) -> Path:
    """`base` with a wider state in layer 1: rows that surgery appended, in tensors that it had."""
    expand_checkpoint(base, path, operator="widen_state", factor=2, layers=[1], progress=False)
    return path


def write_documents(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    """JSON lines, compressed when the name says so."""
    lines = "".join(json.dumps({field: text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def recipe_values(**sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe of a few tiny steps, with sections laid over it."""
    values: dict[str, Any] = {
        "data": {"sequence_length": 32, "mixture": [{"kind": "text"}, {"kind": "mqar", "num_pairs": [2, 4]}]},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"max_steps": 6, "warmup_steps": 2, "min_ratio": 0.1},
        "training": {"batch_size": 2, "gradient_accumulation": 2, "save_every": 2},
        "logging": {"every": 1},
    }
    return {key: {**values.get(key, {}), **sections.get(key, {})} for key in {**values, **sections}}


def write_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """`recipe_values` as a file."""
    path.write_text(yaml.safe_dump(recipe_values(**sections)))
    return path


def run(checkpoint: Path, text: Path | None, out: Path, resume: bool = False, **sections: dict[str, Any]) -> FinetuneResult:
    if resume:
        return finetune(checkpoint, out=out, resume=True, device="cpu", progress=False)
    recipe = write_recipe(out.with_name(out.name + ".yaml"), **sections)
    return finetune(checkpoint, recipe, text, out, device="cpu", progress=False)


def log_without_times(out: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in read_log(out / "log.csv")]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.load(name) for name in checkpoint.tensors}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send Ctrl-C while that step is computed."""
    real = Trainer._step

    def interrupted(self: Trainer) -> Any:
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Trainer, "_step", interrupted)
