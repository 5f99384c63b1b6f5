"""The header of a safetensors file, read and written without torch: eight bytes of length, a JSON table, then the raw values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .tensor_info import CODE_OF, CODES, SIZES, TensorInfo

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version "
"""What a pointer begins with that git leaves in the place of a large file."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: shape, dtype and the offset of its first byte."""

    info: TensorInfo
    offset: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file and its metadata strings.

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            if start == _LFS_POINTER:
                raise CheckpointError("the file is a Git LFS pointer, not the weights", where=str(path), fix="Run `git lfs pull`")
            length = int.from_bytes(start, "little")
            if size < _LENGTH_BYTES + 2:
                raise _broken(path, f"the file has {size} bytes")
            if length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise _broken(path, f"its header should have {length} bytes and the file has {size}")
            table = json.loads(file.read(length))
        metadata = table.pop("__metadata__", {})
        entries = {name: _entry(path, name, row, _LENGTH_BYTES + length) for name, row in table.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(path), fix="Check its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"its header is not a table of tensors ({error})") from error
    end = max((entry.offset + entry.info.nbytes for entry in entries.values()), default=_LENGTH_BYTES + length)
    if end != size:
        raise _broken(path, f"its tensors end at byte {end} and the file at byte {size}")
    return entries, metadata


def _entry(path: Path, name: str, row: Mapping[str, Any], start: int) -> Entry:
    code = row["dtype"]
    begin, end = row["data_offsets"]
    if code not in CODES:
        raise CheckpointError(
            f"the tensor {name} has the unknown dtype {code}", where=str(path), fix="Use bf16, fp16 or fp32 weights"
        )
    info = TensorInfo(row["shape"], CODES[code])
    if not 0 <= begin <= end or end - begin != info.nbytes:
        raise ValueError(f"{name} of shape {list(info.shape)} lies at bytes {begin} to {end}")
    return Entry(info, start + begin)


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"truncated or broken safetensors file: {what}", where=str(path), fix="Copy or download the file again")


def lay_out(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Entry]]:
    """The leading bytes of a file that will hold these tensors, and where each belongs.

    Wide dtypes come first, so that every tensor starts at a multiple of its element's size.
    """
    order = sorted(tensors, key=lambda name: -SIZES[tensors[name].dtype])
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    position, begins = 0, {}
    for name in order:
        info = tensors[name]
        begins[name] = position
        table[name] = {
            "dtype": CODE_OF[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + math.prod(info.shape) * SIZES[info.dtype]],
        }
        position += info.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = _LENGTH_BYTES + len(text)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: Entry(tensors[name], start + begin) for name, begin in begins.items()}
