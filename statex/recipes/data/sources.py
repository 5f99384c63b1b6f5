"""Token streams: text that is tokenised as it is needed, and synthetic rows. Each can say where it is and return there."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import RecipeError
from ...evals import tracking_rows
from ...evals.mqar_rows import IGNORE, draw_row, token_pools
from ..schema import Entry, MqarEntry, TextEntry, TrackingEntry
from .readers import Piece, Reader, Shard, cut_before, open_reader

SEGMENT_BYTES = 16384
"""Bytes of text that are tokenised at a time: a first batch must not wait for a whole book."""
MAX_EMPTY = 100_000
"""Pieces in a row without a token after which a data set counts as empty."""
_PROBE = "a Z\n~\u00e9\u20ac"


@dataclass(frozen=True)
class Fragment:
    """A run of tokens that attend to nothing before them: ids `[n]` and labels `[n]`, of which the first is `IGNORE`."""

    ids: np.ndarray
    labels: np.ndarray


class Source(Protocol):
    """A weighted stream of documents."""

    weight: float

    def take(self, room: int) -> Fragment | None:
        """At most `room` tokens of the current document, or None when the next document cannot be split and is longer."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Encoder:
    """Text -> token ids without special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self._special = tuple(str(token).encode() for token in tokenizer.all_special_tokens)
        # A byte tokenizer written in Python is slower than a small model on a GPU; its ids are the bytes plus a constant.
        probe = np.frombuffer(_PROBE.encode(), np.uint8).astype(np.int64)
        ids = np.asarray(self._encode(_PROBE), np.int64)
        self._byte_offset = int(ids[0] - probe[0]) if len(ids) == len(probe) and len({*(ids - probe)}) == 1 else None

    def __call__(self, text: bytes) -> np.ndarray:
        """UTF-8 bytes -> int64 ids `[n]`."""
        if self._byte_offset is not None and not any(token in text for token in self._special):
            return np.frombuffer(text, np.uint8).astype(np.int64) + self._byte_offset
        return np.asarray(self._encode(text.decode(errors="replace")), np.int64)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class TextSource:
    """Documents of text, each followed by the tokenizer's end-of-sequence token."""

    def __init__(self, entry: TextEntry, encoder: Encoder, seed: tuple[int, ...], shard: Shard) -> None:
        self.weight, self.where = entry.weight, f"{entry.path}, column '{entry.field}'"
        self.reader: Reader = open_reader(entry, seed, shard)
        self.encoder = encoder
        self._close()

    def take(self, room: int) -> Fragment | None:
        parts: list[np.ndarray] = []
        while room > 0:
            if self.used == len(self.tokens) and not self._advance():
                if parts:
                    break
                self._close()
                continue
            part = self.tokens[self.used : self.used + room]
            self.used += len(part)
            room -= len(part)
            parts.append(part)
        if not self._in_piece():
            self._close()
        ids = np.concatenate(parts)
        labels = ids.copy()
        labels[0] = IGNORE
        return Fragment(ids, labels)

    def state(self) -> dict[str, Any]:
        return {"reader": self.piece_state, "offset": self.offset, "used": self.used, "piece": self._digest()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.reader.load_state(state["reader"])
        self._open(state)

    def _close(self) -> None:
        """Be done with the current piece; the next is read when its first token is asked for."""
        self._open({"reader": self.reader.state(), "offset": 0, "used": 0})

    def _open(self, state: dict[str, Any]) -> None:
        self.piece_state, self.offset, self.used = state["reader"], state["offset"], state["used"]
        self.piece: Piece | None = None
        self.tokens = np.empty(0, np.int64)
        if self.used or self.offset:
            self.piece = self.reader.next()
            self._tokenise()
            if state.get("piece", self._digest()) != self._digest() or self.used > len(self.tokens):
                what, fix = "the text is not the one that this run has read", "Give it back as it was, or start over with --force."
                raise RecipeError(what, where=self.where, fix=fix)

    def _digest(self) -> int | None:
        """Of the current piece, by which a resumed run knows its text again."""
        return None if self.piece is None else zlib.crc32(self.piece.text)

    def _in_piece(self) -> bool:
        """Whether the current piece has tokens left."""
        return self.piece is None or self.used < len(self.tokens) or self.next_offset < len(self.piece.text)

    def _advance(self) -> bool:
        """Tokenise the next segment; False at the end of a piece, after which no token is left."""
        if self.piece is not None:
            if self.next_offset == len(self.piece.text):
                return False
            self.offset, self.used = self.next_offset, 0
            self._tokenise()
            return True
        for _ in range(MAX_EMPTY):
            self.piece_state = self.reader.state()
            self.piece = self.reader.next()
            if self.piece.text:
                self._tokenise()
                if len(self.tokens):
                    return True
        raise RecipeError("the data set has no text", where=self.where, fix="Name another --data.")

    def _tokenise(self) -> None:
        assert self.piece is not None
        text = self.piece.text
        self.next_offset = cut_before(text, self.offset + SEGMENT_BYTES)
        self.tokens = self.encoder(text[self.offset : self.next_offset])
        if self.next_offset == len(text) and self.piece.ends_document and self.encoder.eos is not None:
            self.tokens = np.append(self.tokens, self.encoder.eos)


class RowSource(ABC):
    """Synthetic rows, each drawn from its own number, so that the number is all there is to remember. A row is never split."""

    def __init__(self, weight: float, seed: tuple[int, ...], shard: Shard) -> None:
        self.weight, self.seed, self.shard = weight, seed, shard
        self.number = shard.index
        self.pending: Fragment | None = None

    @abstractmethod
    def draw(self, number: int, rng: np.random.Generator) -> Fragment:
        """Row number `number`."""

    def take(self, room: int) -> Fragment | None:
        if self.pending is None:
            self.pending = self.draw(self.number, np.random.default_rng([*self.seed, self.number]))
        if len(self.pending.ids) > room:
            return None
        fragment, self.pending = self.pending, None
        self.number += self.shard.count
        return fragment

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state(self, state: dict[str, Any]) -> None:
        self.number, self.pending = state["number"], None


class MqarSource(RowSource):
    """Recall rows."""

    def __init__(
        self, entry: MqarEntry, tokenizer: PreTrainedTokenizerBase, seed: tuple[int, ...], shard: Shard, longest: int
    ) -> None:
        super().__init__(entry.weight, seed, shard)
        self.num_pairs = entry.num_pairs
        self.pools = token_pools(tokenizer)
        most = max(self.num_pairs)
        if 4 * most > longest:
            raise RecipeError(
                f"a recall row of {most} pairs takes {4 * most} tokens and rows have {longest}",
                where="num_pairs",
                fix="Raise data.sequence_length or draw fewer pairs.",
            )
        if most > len(self.pools.keys):
            raise RecipeError(
                f"{most} pairs need as many distinct keys, the vocabulary gives {len(self.pools.keys)}",
                where="num_pairs",
                fix="Draw fewer pairs.",
            )

    def draw(self, number: int, rng: np.random.Generator) -> Fragment:
        return Fragment(*draw_row(self.pools, int(rng.choice(self.num_pairs)), rng))


class TrackingSource(RowSource):
    """Words over a state, which get longer as their numbers grow if the entry says so."""

    def __init__(
        self, entry: TrackingEntry, tokenizer: PreTrainedTokenizerBase, seed: tuple[int, ...], shard: Shard, longest: int
    ) -> None:
        super().__init__(entry.weight, seed, shard)
        self.entry = entry
        if entry.longest + 1 > longest:
            raise RecipeError(
                f"a word of {entry.longest} symbols and its answer do not fit into rows of {longest} tokens",
                where="longest",
                fix="Raise data.sequence_length or draw shorter words.",
            )
        try:
            self.vocabulary = tracking_rows.symbol_ids(tokenizer)
        except ValueError as error:
            raise RecipeError(str(error), where="kind: tracking", fix="Leave this entry out for this checkpoint.") from error

    def draw(self, number: int, rng: np.random.Generator) -> Fragment:
        entry, problem = self.entry, tracking_rows.PROBLEMS[str(rng.choice(self.entry.problems))]
        grown = 1.0 if entry.growth == 0 else min(1.0, number / entry.growth)
        shortest = max(entry.shortest, problem.shortest)
        # By equal factors: the step from 4 symbols to 8 is harder than that from 20 to 24.
        longest = max(shortest, round(entry.shortest * (entry.longest / entry.shortest) ** grown))
        return Fragment(*tracking_rows.draw_row(problem, self.vocabulary, int(rng.integers(shortest, longest + 1)), rng))


def open_sources(
    mixture: Sequence[Entry], tokenizer: PreTrainedTokenizerBase, *, longest: int, seed: tuple[int, ...], shard: Shard
) -> list[Source]:
    """The sources of a mixture, seeded by their place in it. Raises `RecipeError` for data that cannot be used."""
    encoder = Encoder(tokenizer)

    def open_source(entry: Entry, seed: tuple[int, ...]) -> Source:
        if isinstance(entry, MqarEntry):
            return MqarSource(entry, tokenizer, seed, shard, longest)
        if isinstance(entry, TrackingEntry):
            return TrackingSource(entry, tokenizer, seed, shard, longest)
        return TextSource(entry, encoder, seed, shard)

    return [open_source(entry, (*seed, index)) for index, entry in enumerate(mixture)]
