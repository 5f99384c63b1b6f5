"""Documents from files or the hub, through `datasets`, as pieces of UTF-8 text in an endless shuffled order that can be resumed.

Files are converted once to a memory-mapped Arrow table (`datasets` keeps it in its cache), so that any piece is read by its index
and nothing is held in memory. Of n devices each reads every n-th piece of the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow.compute

from ...errors import RecipeError
from ..schema import TextEntry

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz",)
LOOKAHEAD = 128
"""Bytes searched for white space before a text is cut inside a word."""


@dataclass(frozen=True)
class Shard:
    """Which part of a shared order a process reads."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one."""

    text: bytes
    ends_document: bool


class Reader(Protocol):
    """Pieces in an endless order. After `load_state(state)`, `next` gives again the piece that it gave after `state()`."""

    def next(self) -> Piece: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def cut_before(text: bytes, offset: int) -> int:
    """The place at or after `offset` where a UTF-8 text may be cut: before white space if that is near, else between characters."""
    if offset <= 0 or offset >= len(text):
        return min(max(offset, 0), len(text))
    for place in range(offset, min(offset + LOOKAHEAD, len(text))):
        if text[place] in b" \n":
            return place
    while offset < len(text) and text[offset] & 0xC0 == 0x80:
        offset += 1
    return offset


def open_reader(entry: TextEntry, seed: tuple[int, ...], shard: Shard) -> Reader:
    """Open an entry's documents. Raises `RecipeError`: no path, missing files, unreadable data, no such column, no documents."""
    table = _load(entry)
    if entry.streaming:
        return StreamedReader(table, entry, seed, shard)
    return IndexedReader(table, entry, seed, shard)


class IndexedReader:
    """Pieces of a memory-mapped table, in a new permutation each epoch."""

    def __init__(self, table: datasets.Dataset, entry: TextEntry, seed: tuple[int, ...], shard: Shard) -> None:
        self.table, self.field, self.piece_bytes, self.seed, self.shard = table, entry.field, entry.piece_bytes, seed, shard
        # Only offsets are read here, not the text.
        kind = table.features[entry.field].dtype if isinstance(table.features[entry.field], datasets.Value) else "nested"
        if kind not in ("string", "large_string"):
            raise RecipeError(f"column '{entry.field}' holds no text ({kind})", where=str(entry.path), fix="Write it as strings.")
        lengths = pyarrow.compute.binary_length(table.data.column(entry.field)).fill_null(0).to_numpy()
        counts = -(-lengths // entry.piece_bytes) if entry.piece_bytes else (lengths > 0).astype(np.int64)
        self.ends = np.cumsum(counts)
        self.pieces = int(self.ends[-1]) if len(self.ends) else 0
        if not self.pieces:
            raise RecipeError("the data set has no text", where=f"{entry.path}, column '{entry.field}'", fix="Name another --data.")
        self.position = shard.index
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def next(self) -> Piece:
        epoch, place = divmod(self.position, self.pieces)
        self.position += self.shard.count
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.pieces)
        index = int(self.order[place])
        document = int(np.searchsorted(self.ends, index, side="right"))
        text = self.table[document][self.field].encode()
        if not self.piece_bytes:
            return Piece(text, True)
        part = index - (int(self.ends[document - 1]) if document else 0)
        start, stop = (cut_before(text, (part + i) * self.piece_bytes) for i in (0, 1))
        return Piece(text[start:stop], stop == len(text))

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class StreamedReader:
    """Pieces of a data set that is read as it arrives, shuffled within blocks of documents."""

    def __init__(self, stream: datasets.IterableDataset, entry: TextEntry, seed: tuple[int, ...], shard: Shard) -> None:
        self.stream, self.entry, self.seed, self.shard = stream, entry, seed, shard
        self.block = 0
        self.block_state = stream.state_dict()
        self.documents: Iterator[dict[str, Any]] = iter(stream)
        self.pieces: list[Piece] = []
        self.index = 0

    def next(self) -> Piece:
        passes = 0
        while self.index >= len(self.pieces):
            if not self._read_block():
                passes += 1
            if passes > 1:
                raise RecipeError(
                    "the data set has no text for this device",
                    where=f"{self.entry.path}, column '{self.entry.field}'",
                    fix="Name another --data, or use fewer devices.",
                )
        self.index += 1
        return self.pieces[self.index - 1]

    def state(self) -> dict[str, Any]:
        return {"block": self.block, "stream": self.block_state, "index": self.index}

    def load_state(self, state: dict[str, Any]) -> None:
        self.block, self.index, self.pieces = state["block"], state["index"], []
        if self.block:
            self.stream.load_state_dict(state["stream"])
            self.documents = iter(self.stream)
            self.block -= 1
            self._read_block()
            self.index = state["index"]

    def _read_block(self) -> bool:
        """Fill `pieces` from the next documents; False where the data set ended and starts again."""
        before = self.stream.state_dict()
        texts = [text.encode() for text in self._texts()]
        if not texts:
            self.stream = _load(self.entry)
            self.documents = iter(self.stream)
            return False
        self.block_state, self.index, self.block = before, 0, self.block + 1
        pieces = [piece for text in texts for piece in self._cut(text)]
        order = np.random.default_rng([*self.seed, self.block]).permutation(len(pieces))
        self.pieces = [pieces[i] for i in order[self.shard.index :: self.shard.count]]
        return True

    def _texts(self) -> Iterator[str]:
        for _, row in zip(range(self.entry.shuffle_block), self.documents, strict=False):
            if self.entry.field not in row:
                raise _no_column(self.entry, list(row))
            yield row[self.entry.field] or ""

    def _cut(self, text: bytes) -> Iterator[Piece]:
        size = self.entry.piece_bytes or max(len(text), 1)
        for start in range(0, len(text), size):
            stop = cut_before(text, start + size)
            yield Piece(text[cut_before(text, start) : stop], stop == len(text))


def _no_column(entry: TextEntry, columns: list[str]) -> RecipeError:
    return RecipeError(
        f"no column '{entry.field}'", where=str(entry.path), fix=f"Set the entry's `field` to one of: {', '.join(columns)}."
    )


def _suffix(path: Path) -> str:
    """The suffix that tells the format: `.jsonl` of `books.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _local_files(entry: TextEntry) -> list[Path] | None:
    """The files that a path names, or None when it is a hub id."""
    assert entry.path is not None
    path = Path(entry.path).expanduser()
    formats = ", ".join(BUILDERS)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _suffix(file) in BUILDERS)
        if not files:
            raise RecipeError("the folder holds no data files", where=str(path), fix=f"Known formats: {formats} (also .gz).")
        if len({BUILDERS[_suffix(file)] for file in files}) > 1:
            raise RecipeError("the folder mixes formats", where=str(path), fix="Give each file an entry of its own.")
        return files
    if path.is_file():
        if _suffix(path) not in BUILDERS:
            raise RecipeError(f"unknown data format '{path.suffix}'", where=str(path), fix=f"Known formats: {formats} (also .gz).")
        return [path]
    if _suffix(path) in BUILDERS or path.is_absolute() or entry.path.startswith((".", "~")) or entry.path.count("/") > 1:
        raise RecipeError("the data file does not exist", where=str(path), fix="Check the path.")
    return None


def _load(entry: TextEntry) -> Any:
    """A `Dataset`, or an `IterableDataset` when the entry is streamed."""
    if entry.path is None:
        raise RecipeError(
            "the recipe leaves its text open", where="data.mixture", fix="Name a file, a folder or a hub id with --data."
        )
    files = _local_files(entry)
    quiet = files is not None and not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    try:
        if quiet:
            datasets.disable_progress_bars()
        # What cannot be read is told once, below.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        if files is None:
            table = datasets.load_dataset(entry.path, entry.name, split=entry.split, streaming=entry.streaming)
        else:
            builder = BUILDERS[_suffix(files[0])]
            options = {"sample_by": "document"} if builder == "text" else {}
            names = [str(file) for file in files]
            table = datasets.load_dataset(builder, data_files=names, split="train", streaming=entry.streaming, **options)
    except Exception as error:  # datasets raises dozens of kinds, from pyarrow, fsspec and the hub
        if isinstance(error, StopIteration):  # of an empty JSONL file
            raise RecipeError("the data set is empty", where=entry.path, fix="Name another --data.") from error
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        fix = "Check the hub id and its split." if files is None else "Check that the file is complete, and its text UTF-8."
        raise RecipeError(f"cannot read the data: {reason}", where=entry.path, fix=fix) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if quiet:
            datasets.enable_progress_bars()
    columns = table.column_names
    if columns is not None and entry.field not in columns:
        raise (
            _no_column(entry, columns)
            if columns
            else RecipeError("the data set is empty", where=entry.path, fix="Name another --data.")
        )
    return table
