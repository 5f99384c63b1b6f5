"""Rows that begin alike, as data: a stem of tokens, and the rows that leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NODE_TOKENS = 256
"""Tokens that are worth the forward passes that a branching point takes."""

Advance = Callable[[int], None]
"""Told the number of rows that were just scored."""


@dataclass(frozen=True)
class Row:
    """One row of a stem: the stem's first `at` tokens and then `tail` `[T]`, of which the last `keep` (< T) are scored."""

    at: int
    tail: np.ndarray
    keep: int


@dataclass(frozen=True)
class Stem:
    """Token ids `[S]` and the rows that leave them, each at its own place."""

    ids: np.ndarray
    rows: tuple[Row, ...]

    def whole(self, row: Row) -> np.ndarray:
        """All token ids of one of its rows."""
        return np.concatenate([self.ids[: row.at], row.tail])

    @property
    def nodes(self) -> list[int]:
        """Where rows leave, ascending."""
        return sorted({row.at for row in self.rows})

    @property
    def is_worth_branching(self) -> bool:
        """Whether sharing saves enough."""
        nodes = self.nodes
        saved = sum(row.at for row in self.rows) - nodes[-1]
        return saved >= NODE_TOKENS * len(nodes)


@dataclass(frozen=True)
class RowScore:
    """Teacher-forced scores of the last tokens of a row, `[keep]`.

    Attributes:
        correct: the most likely token was the right one. Where all tokens of an answer are, greedy generation gives that answer.
        nats: minus the log-probability of the right token.
    """

    correct: np.ndarray
    nats: np.ndarray


def stem_of(rows: Sequence[tuple[np.ndarray, int]]) -> Stem:
    """The stem of rows given whole, `(ids [T], keep)`: what all begin with, up to the last token before any answer."""
    shortest = min(len(ids) - keep - 1 for ids, keep in rows)
    common, first = 0, rows[0][0]
    while common < shortest and all(ids[common] == first[common] for ids, _ in rows):
        common += 1
    return Stem(first[:common], tuple(Row(common, ids[common:], keep) for ids, keep in rows))
