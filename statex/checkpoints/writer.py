"""Write a checkpoint: tensor by tensor, in shards, complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import CheckpointError
from .safetensors_header import Entry, lay_out
from .tensor_info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000
_MARGIN_BYTES = 1_000_000


class OutputFolder:
    """A folder that appears under its name when complete: written beside, renamed by `publish`, removed at the end of a `with`
    block that did not get there, by an error or Ctrl-C too.

    Args:
        out: where it shall appear.
        force: replace a checkpoint that is there.
        need: bytes that will be written, checked against the free space first.
        protect: folders that must not be replaced, such as the source.
    Raises:
        CheckpointError: `out` exists (and is not to be replaced, or holds something else than a checkpoint), cannot be made, or the
            disk is too small.
    """

    def __init__(self, out: str | Path, *, force: bool = False, need: int = 0, protect: Sequence[str | Path] = ()) -> None:
        self.out = Path(out).expanduser().absolute()
        self.need = need
        self._published = False
        _check_target(self.out, force, protect)
        with self.errors():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = self.out.with_name(f".{self.out.name}.partial-{secrets.token_hex(4)}")
            self.folder.mkdir()
        free = shutil.disk_usage(self.folder).free
        if free < need + _MARGIN_BYTES:
            self.discard()
            raise CheckpointError(
                f"the disk is too full: {_bytes(need)} are needed and {_bytes(free)} are free",
                where=str(self.out),
                fix="Free some space or choose another disk",
            )

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the system's errors into one that says what was needed."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what, fix = f"the disk is full: {_bytes(self.need)} are needed in all", "Free some space or choose another disk"
            else:
                what, fix = (
                    f"cannot write: {error.strerror or error}",
                    "Check the path and its permissions, or choose another folder",
                )
            raise CheckpointError(what, where=str(self.out), fix=fix) from error

    def write_text(self, name: str, text: str) -> None:
        """A text file in the folder."""
        with self.errors():
            (self.folder / name).write_text(text, encoding="utf-8")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.json."""
        self.write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def copy(self, files: Iterable[Path]) -> None:
        """Copies of files, under the names that they have."""
        with self.errors():
            for path in files:
                shutil.copyfile(path, self.folder / path.name)

    def publish(self) -> None:
        """Give the folder its name; what was there goes only when that has worked."""
        with self.errors():
            replaced = None
            if self.out.exists():
                replaced = self.folder.with_name(self.folder.name.replace(".partial-", ".replaced-"))
                self.out.rename(replaced)
            try:
                self.folder.rename(self.out)
            except BaseException:
                if replaced is not None:
                    replaced.rename(self.out)
                raise
            self._published = True
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written, unless it was published."""
        if not self._published:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()


class CheckpointWriter:
    """Streams a checkpoint to a new folder; memory holds one tensor at a time.

        with CheckpointWriter(out, {name: TensorInfo(shape, dtype), ...}) as writer:
            writer.add(name, tensor)
            writer.finish(config)

    Leaving the block without `finish`, by an exception or Ctrl-C too, leaves nothing behind.

    Args:
        out: the folder to make.
        tensors: everything that will be added; the files are laid out from it before the first tensor comes.
        metadata: strings for the header of every file, beside `format: pt`.
        force, protect: see `OutputFolder`.
        max_shard_bytes: a file is closed before it would grow beyond this.
    Raises:
        CheckpointError: see `OutputFolder`.
    """

    def __init__(
        self,
        out: str | Path,
        tensors: Mapping[str, TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
        force: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        protect: Sequence[str | Path] = (),
    ) -> None:
        self._tensors, self._pending = dict(tensors), set(tensors)
        self._files: dict[str, IO[bytes]] = {}
        self._places: dict[str, tuple[str, Entry]] = {}
        self._total = sum(info.nbytes for info in tensors.values())
        self._output = OutputFolder(out, force=force, need=self._total, protect=protect)
        try:
            self._open_shards({"format": "pt", **(metadata or {})}, max_shard_bytes)
        except BaseException:
            self._abort()
            raise

    def _open_shards(self, metadata: Mapping[str, str], max_shard_bytes: int) -> None:
        shards = _split(self._tensors, max_shard_bytes)
        for number, names in enumerate(shards, start=1):
            file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header, entries = lay_out({name: self._tensors[name] for name in names}, metadata)
            with self._output.errors():
                self._files[file_name] = (self._output.folder / file_name).open("wb")
                self._files[file_name].write(header)
            self._places |= {name: (file_name, entry) for name, entry in entries.items()}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one declared tensor to its place.

        Raises:
            ValueError: not declared, added before, or of another shape or dtype than declared.
            CheckpointError: the disk is full or gone.
        """
        if name not in self._pending:
            raise ValueError(f"{name} was {'added before' if name in self._tensors else 'not declared'}")
        if TensorInfo(tensor.shape, tensor.dtype) != self._tensors[name]:
            raise ValueError(f"{name} was declared as {self._tensors[name]} and is {tensor.dtype} {list(tensor.shape)}")
        file_name, entry = self._places[name]
        with self._output.errors():
            file = self._files[file_name]
            file.seek(entry.offset)
            file.write(tensor_bytes(tensor))
        self._pending.remove(name)

    def finish(
        self, config: Mapping[str, Any], carried_files: Iterable[Path] = (), extra_files: Mapping[str, str] | None = None
    ) -> None:
        """Write config.json, the index where there are several shards, and the other files; then the folder appears.

        Args:
            carried_files: copied as they are. extra_files: texts by file name.
        Raises:
            ValueError: a declared tensor was not added.
            CheckpointError: the disk is full or gone.
        """
        if self._pending:
            raise ValueError(f"{len(self._pending)} declared tensors were not added, among them {min(self._pending)}")
        with self._output.errors():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {name: file_name for name, (file_name, _) in sorted(self._places.items())},
            }
            self._output.write_text("model.safetensors.index.json", json.dumps(index, indent=2))
        self._output.copy(carried_files)
        self._output.write_config(config)
        for name, text in (extra_files or {}).items():
            self._output.write_text(name, text)
        self._output.publish()

    def _abort(self) -> None:
        """Nothing is left behind, unless the folder was published."""
        for file in self._files.values():
            # Closing flushes, which fails again on a full disk; the file goes anyway.
            with contextlib.suppress(OSError):
                file.close()
        self._output.discard()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._abort()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they are stored."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _split(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names by shard, in their order, each shard at most `max_bytes` unless a single tensor is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return shards


def _check_target(out: Path, force: bool, protect: Sequence[str | Path]) -> None:
    for kept in protect:
        if Path(kept).expanduser().resolve().is_relative_to(out.resolve()):
            raise CheckpointError("the output would replace its own source", where=str(out), fix="Choose another output folder")
    if not out.exists():
        return
    if not force:
        raise CheckpointError("the output exists already", where=str(out), fix="Choose another folder, or --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise CheckpointError(
            "the output exists and is not a checkpoint, so it is not replaced", where=str(out), fix="Choose another folder"
        )


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
