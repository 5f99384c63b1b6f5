"""The weight files of a folder: which there are, what they hold, and one tensor at a time out of them. Reading safetensors headers
needs no torch; reading a `.bin` does."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError
from .safetensors_header import Entry, read_header
from .tensor_info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

_AGAIN = "Copy or download the file again"


class Weights(Protocol):
    """Tensors by the names that the files give them."""

    tensors: dict[str, TensorInfo]
    files: list[Path]

    def load(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""

    def close(self) -> None:
        """Let go of what is mapped."""


def find_weights(folder: Path) -> Weights:
    """The weights of a folder, safetensors before `.bin`, as transformers chooses.

    Raises:
        CheckpointError: there are none, an index names files or tensors that are absent, or a file is broken.
    """
    if (folder / SINGLE).is_file():
        return SafetensorsWeights([folder / SINGLE], None)
    if (folder / INDEX).is_file():
        shards, names = read_index(folder / INDEX)
        return SafetensorsWeights(shards, names)
    if (folder / BIN).is_file():
        return BinWeights([folder / BIN], None)
    if (folder / BIN_INDEX).is_file():
        shards, names = read_index(folder / BIN_INDEX)
        return BinWeights(shards, names)
    raise CheckpointError(
        "the folder holds no weights", where=str(folder), fix=f"Put {SINGLE}, {INDEX}, {BIN} or {BIN_INDEX} there"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` when it is missing or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path.name}: {error.strerror}", where=str(path), fix="Give a checkpoint's folder"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}", where=str(path), fix=_AGAIN) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object", where=str(path), fix=_AGAIN)
    return data


def read_index(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards that an index names, and the shard of each tensor."""
    table = read_json(path).get("weight_map")
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(name, str) and Path(name).name == name for name in table.values())
    ):
        raise CheckpointError("the index has no weight_map from tensors to files beside it", where=str(path), fix=_AGAIN)
    missing = sorted({name for name in table.values() if not (path.parent / name).is_file()})
    if missing:
        raise CheckpointError(
            f"the index names {len(missing)} shard(s) that are not there: {', '.join(missing[:4])}",
            where=str(path),
            fix="Copy or download the missing files",
        )
    return sorted({path.parent / name for name in table.values()}), {tensor: path.parent / name for tensor, name in table.items()}


def _indexed(held: Mapping[str, Path], names: Mapping[str, Path] | None) -> Mapping[str, Path]:
    """Which file each tensor is in; what an index says must be so."""
    for name, path in (names or {}).items():
        if held.get(name) != path:
            what = f"the index says that {name} is in {path.name}, and it is not"
            raise CheckpointError(what, where=str(path), fix="Copy or download index and shards of one version")
    return held if names is None else names


class SafetensorsWeights:
    """safetensors files. A tensor is read straight into memory of its own, so what is not needed any more is free again."""

    def __init__(self, files: list[Path], names: Mapping[str, Path] | None) -> None:
        self.files = files
        headers = {path: read_header(path)[0] for path in files}
        held = {name: path for path, entries in headers.items() for name in entries}
        self._places: dict[str, tuple[Path, Entry]] = {
            name: (path, headers[path][name]) for name, path in _indexed(held, names).items()
        }
        self.tensors = {name: entry.info for name, (_, entry) in self._places.items()}

    def load(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises `CheckpointError` when the file has changed since it was opened."""
        import torch

        path, entry = self._places[name]
        data = torch.empty(entry.info.nbytes, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                file.seek(entry.offset)
                read = file.readinto(data.numpy().data) if entry.info.nbytes else 0
        except OSError as error:
            raise CheckpointError(f"cannot read {name}: {error.strerror}", where=str(path), fix="Check the disk") from error
        if read != entry.info.nbytes:
            raise CheckpointError(
                f"the file ends inside {name}", where=str(path), fix="It was changed while being read; start again"
            )
        return data.view(entry.info.torch_dtype).reshape(entry.info.shape)

    def close(self) -> None:
        """Nothing is held open between reads."""


class BinWeights:
    """`pytorch_model.bin` files, mapped, never by pickle code (`weights_only`)."""

    _REMAP_BYTES = 64 * 2**20
    """Pages of a mapped file count as memory once touched; after this many bytes the mapping is let go and made anew."""

    def __init__(self, files: list[Path], names: Mapping[str, Path] | None) -> None:
        self.files = files
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        self._touched = 0
        held = {name: path for path in files for name in self._open(path)}
        self._places = dict(_indexed(held, names))
        self.tensors = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in self._all()}

    def _all(self) -> list[tuple[str, Tensor]]:
        return [(name, self._open(path)[name]) for name, path in self._places.items()]

    def _open(self, path: Path) -> dict[str, Tensor]:
        if path not in self._mapped:
            self._mapped[path] = _load_bin(path)
        return self._mapped[path]

    def load(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        path = self._places[name]
        copy = self._open(path)[name].detach().clone()
        self._touched += copy.nbytes
        if self._touched > self._REMAP_BYTES:
            self.close()
        return copy

    def close(self) -> None:
        """Unmap the files; a later `load` maps them again."""
        self._mapped.clear()
        self._touched = 0


def _load_bin(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            data = torch.load(path, map_location="cpu", weights_only=True)  # files older than torch 1.6 cannot be mapped
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the file needs pickle code to load, or is truncated; such code is never run",
            where=str(path),
            fix="Ask for the weights as safetensors, or convert the file where you trust it",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"truncated or broken weight file: {reason}", where=str(path), fix="Copy or download it again"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        what = "the file must hold a table of tensors and nothing else"
        raise CheckpointError(what, where=str(path), fix="Save the model's state_dict in its place")
    return data
