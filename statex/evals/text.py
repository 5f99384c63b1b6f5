"""Text for evaluations: documents from files, stretches of them of an exact number of tokens."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import EvaluationError
from .listed import listed

FORMATS = ".txt, .jsonl (field `text`), both also as .gz, or .parquet (field `text`)"
_SENTENCE_START = re.compile(r"(?<=[.!?])\s+(?=\S)")


class Encoder(Protocol):
    """The part of a transformers tokenizer that evaluations need."""

    all_special_ids: list[int]

    def __len__(self) -> int: ...
    def __call__(self, text: str, **options: Any) -> Any: ...
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def get_vocab(self) -> dict[str, int]: ...


def encode(tokenizer: Encoder, text: str) -> np.ndarray:
    """Token ids `[T]` of a text, without special tokens (some tokenizers append an end of sequence)."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


def encode_exactly(tokenizer: Encoder, text: str, what: str) -> np.ndarray:
    """Token ids `[T]` of a text that must survive the way there and back, white space aside.

    Raises:
        EvaluationError: it does not (a vocabulary without these characters, or one that changes them).
    """
    ids = encode(tokenizer, text)
    back = tokenizer.decode(ids.tolist())
    if "".join(back.split()) != "".join(text.split()):
        raise EvaluationError(
            f"the tokenizer cannot write {what}: {text.strip()!r} comes back as {back.strip()!r}",
            where="tokenizer",
            fix="Choose values that its vocabulary holds (niah, niah_words, niah_uuids), or give the model's own tokenizer",
        )
    return ids


def start_ids(tokenizer: Encoder) -> np.ndarray:
    """What the tokenizer puts before a text (`<s>` or nothing), so that a model sees the beginning it was trained on."""
    plain, full = list(encode(tokenizer, "a")), list(tokenizer.encode("a", add_special_tokens=True))
    starts = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return np.asarray(full[:starts], dtype=np.int64)


def byte_offsets(tokenizer: Encoder, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[T]` of a text and the UTF-8 bytes `[T]` that each stands for; the bytes add up to the text's.

    Exact for fast tokenizers (character offsets; a character split over tokens counts with its first) and for byte tokenizers.
    Other slow tokenizers keep no offsets: each token counts its share of the total, which is exact over whole documents.
    """
    total = len(text.encode())
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        ends = np.asarray([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
        reached = np.maximum.accumulate(before[ends]) if len(ends) else ends
    else:
        ids = encode(tokenizer, text)
        reached = np.linspace(0, total, len(ids) + 1)[1:].round().astype(np.int64)
    if len(reached):
        reached[-1] = total
    return ids, np.diff(reached, prepend=0)


def source_name(data: str | Path | Sequence[str | Path] | None) -> str:
    """The data's name for messages and notes; file names only, since reports travel."""
    paths = listed(data) or []
    return ", ".join(Path(path).name for path in paths)


def read_documents(data: str | Path | Sequence[str | Path]) -> list[str]:
    """The non-empty documents of one file or several. A .txt file is one document, a JSONL line or a parquet row is one.

    Raises:
        EvaluationError: no such file, unknown ending, a line that is no JSON, no field `text`, or no text at all.
    """
    paths = [Path(path) for path in listed(data)]
    documents = [text for path in paths for text in _read(path) if text.strip()]
    if not documents:
        raise EvaluationError(
            "there is no text in the data", where=", ".join(map(str, paths)), fix=f"Give a file with text: {FORMATS}"
        )
    return documents


def _read(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise EvaluationError("there is no such data file", where=str(path), fix=f"Give the path of a file: {FORMATS}")
    endings = [ending for ending in path.suffixes if ending != ".gz"][-1:]
    try:
        if endings == [".txt"]:
            yield _open(path).read()
        elif endings in ([".jsonl"], [".json"]):
            yield from _jsonl(path)
        elif endings == [".parquet"] and path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            raise EvaluationError("the data file has an ending that is not known", where=str(path), fix=f"Known are {FORMATS}")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"the data file cannot be read ({error})", where=str(path), fix="Check that it is complete UTF-8 text"
        ) from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _jsonl(path: Path) -> Iterator[str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise EvaluationError(
                    f"the line is not valid JSON ({error})", where=where, fix="Write one JSON object a line"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise EvaluationError(
                    f"the line has no field `text` that holds a string (found: {found})",
                    where=where,
                    fix="Rename the field that holds the text",
                )
            yield row["text"]


def _parquet(path: Path) -> Iterator[str]:
    import datasets

    verbosity = datasets.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # datasets and pyarrow raise dozens of kinds
        reason = str(error.__cause__ or error).splitlines()[0]
        raise EvaluationError(
            f"the data file cannot be read ({reason})", where=str(path), fix="Check that it is a complete parquet file"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    if "text" not in rows.column_names:
        raise EvaluationError(
            f"the file has no column `text` (found: {', '.join(rows.column_names)})",
            where=str(path),
            fix="Rename the column that holds the text",
        )
    yield from (row for row in rows["text"] if row)


class Haystack:
    """Stretches of exactly as many tokens as asked for, drawn from real text."""

    def __init__(self, tokenizer: Encoder, documents: Sequence[str], source: str) -> None:
        self.text, self.source = "\n\n".join(documents), source
        self._tokenizer = tokenizer

    def draw(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Token ids `[length]` of a stretch that begins at a random sentence (or at the text's start, if it takes all of the text).

        Raises:
            EvaluationError: the text has fewer tokens.
        """
        where, width = rng.random(), 2 * length
        while True:
            start = int(where * max(0, len(self.text) - width))
            stretch = self.text[start : start + width]
            border = _SENTENCE_START.search(stretch) if start else None
            ids = encode(self._tokenizer, stretch[border.end() :] if border else stretch)
            if len(ids) >= length:
                return ids[:length]
            if width >= len(self.text):
                raise EvaluationError(
                    f"a stretch of {length} tokens is asked for, the text has {len(ids)}",
                    where=self.source,
                    fix="Give more text or shorter lengths",
                )
            width *= 2


def sentence_borders(tokenizer: Encoder, ids: np.ndarray) -> np.ndarray:
    """Positions in `ids` `[T]` at which a sentence has just ended (its full stop is the token before, white space follows)."""
    unique, inverse = np.unique(ids, return_inverse=True)
    tokens = [token or " " for token in tokenizer.convert_ids_to_tokens(unique.tolist())]
    ends = np.array([token[-1] in ".!?" for token in tokens], dtype=bool)[inverse]
    # Byte-level and sentencepiece vocabularies write a leading space or newline as one of these.
    spaces = np.array([token[0] in " \n\u0120\u010a\u2581" for token in tokens], dtype=bool)[inverse]
    return np.flatnonzero(ends[:-1] & spaces[1:]) + 1
