"""What a user gives by name: a tokenizer, a device, a dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from ..checkpoints.hub import locate_tokenizer
from ..errors import CheckpointError, StatexError

TOKENIZER_FILES = ("tokenizer", "vocab", "spiece.model")
"""How the names of tokenizer files begin. In a folder without any transformers would make up an empty tokenizer."""


def load_tokenizer(
    where: str | Path, *, fix: str = "Copy the tokenizer's files there, or give --tokenizer FOLDER_OR_HUB_ID"
) -> Any:
    """The tokenizer of a folder or a hub id.

    Args:
        fix: what the error message advises.
    Raises:
        CheckpointError: the folder holds no tokenizer files, or they cannot be read.
    """
    folder = locate_tokenizer(where)
    if not any(path.name.startswith(TOKENIZER_FILES) for path in folder.iterdir()):
        raise CheckpointError("the folder holds no tokenizer", where=str(where), fix=fix)
    try:
        # Nothing about a tokenizer is read from a model's config, whose type transformers need not know (fla's).
        return AutoTokenizer.from_pretrained(str(folder), config=PreTrainedConfig())
    except Exception as error:  # tokenizers raises a bare Exception on a broken file
        raise CheckpointError(f"the tokenizer cannot be loaded ({first_line(error)})", where=str(where), fix=fix) from error


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else the first GPU, else the CPU. Raises `StatexError` if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        # Reading a value back fails on `meta`, too.
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"the device cannot be used ({first_line(error).split('. ')[0]})"
        raise StatexError(reason, where=str(device), fix="Leave --device out, or give cpu or cuda:0") from error
    return found


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype, itself or by name (`float32`, `fp32`, `bfloat16`, `bf16` ...). Raises `StatexError` on others."""
    if dtype is None:
        return None
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
    name = str(dtype).removeprefix("torch.")
    name = short.get(name, name)
    if name not in short.values():
        raise StatexError(f"{dtype!r} is not a dtype to compute in", where="dtype", fix=f"Give one of {', '.join(short.values())}")
    found: torch.dtype = getattr(torch, name)
    return found


def tokenless_ids(tokenizer: Any, vocabulary: int) -> list[int]:
    """Ids below `vocabulary` that no token has: rows that pad a model's embedding. Byte tokenizers cannot even decode them."""
    return sorted(set(range(vocabulary)).difference(tokenizer.get_vocab().values()))


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
