"""MQAR: how many key-value pairs the state can hold (arXiv 2312.04927), and over what distance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..mqar_rows import Pools, draw_row, token_pools
from ..result import ACCURACY, Cell, digest, make_cell
from ..task import Advance, Context, Job, Schedule
from ..text import start_ids
from .needle import DrawHay, book_hay

if TYPE_CHECKING:
    from ..subject import Subject


class MQAR:
    """Rows of n key-value pairs followed by all n queries; one forward pass scores the n answers of a row."""

    name = "mqar"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        pools = _pools(context)
        jobs = [
            Job(f"{num_pairs} pairs", context.options.samples, partial(_run, context, pools, num_pairs))
            for num_pairs in sorted(set(context.options.num_pairs))
        ]
        note = (
            f"keys from {len(pools.keys)} token ids, values from {len(pools.values)}; a row is n pairs, then n queries (4n tokens)"
        )
        return Schedule(jobs, {"num_pairs": "key-value pairs"}, ACCURACY, chance=1 / len(pools.values), notes=(note,))


class MQARGrid:
    """The same with text between pairs and queries, so that every row has the length asked for: pairs x length."""

    name = "mqar_grid"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` where no length holds any number of pairs."""
        pools, (draw_hay, note), options = _pools(context), book_hay(context), context.options
        start = len(start_ids(context.tokenizer))
        points = [
            (n, length)
            for n in sorted(set(options.num_pairs))
            for length in sorted(set(options.lengths))
            if start + 4 * n <= length
        ]
        if not points:
            shortest = start + 4 * min(options.num_pairs)
            raise EvaluationError(
                f"{min(options.num_pairs)} pairs need rows of {shortest} tokens",
                where="lengths",
                fix=f"Give lengths from {shortest}",
            )
        draw_hay(max(length - start - 4 * n for n, length in points), context.rng(self.name))
        jobs = [
            Job(f"{n} pairs in {length}", options.samples, partial(_run_grid, context, pools, draw_hay, n, length))
            for n, length in points
        ]
        notes = (note, "a row is n pairs, text up to the length, n queries; no token of the text is a key")
        axes = {"num_pairs": "key-value pairs", "length": "row length (tokens)"}
        return Schedule(jobs, axes, ACCURACY, chance=1 / len(pools.values), notes=notes)


def _pools(context: Context) -> Pools:
    """Keys and values. Raises `EvaluationError` for more pairs than keys."""
    pools = token_pools(context.tokenizer)
    for num_pairs in context.options.num_pairs:
        if not 1 <= num_pairs <= len(pools.keys):
            raise EvaluationError(
                f"{num_pairs} pairs are asked for, the vocabulary gives 1 to {len(pools.keys)} distinct keys",
                where="num_pairs",
                fix="Ask for a number in that range",
            )
    return pools


def _run(context: Context, pools: Pools, num_pairs: int, subject: Subject, advance: Advance) -> list[Cell]:
    start = start_ids(context.tokenizer)
    drawn = [draw_row(pools, num_pairs, context.rng(MQAR.name, num_pairs, row))[0] for row in range(context.options.samples)]
    rows = [np.concatenate([start, row]) for row in drawn]
    return [_score(subject, rows, num_pairs, {"num_pairs": num_pairs}, advance)]


def _run_grid(
    context: Context, pools: Pools, draw_hay: DrawHay, num_pairs: int, length: int, subject: Subject, advance: Advance
) -> list[Cell]:
    start, rows = start_ids(context.tokenizer), []
    for row in range(context.options.samples):
        rng = context.rng(MQARGrid.name, num_pairs, length, row)
        ids, gap = draw_row(pools, num_pairs, rng)[0], length - len(start) - 4 * num_pairs
        hay = draw_hay(gap, rng) if gap else np.empty(0, dtype=np.int64)
        hay = np.where(np.isin(hay, pools.keys), rng.choice(pools.values, len(hay)), hay)
        rows.append(np.concatenate([start, ids[: 2 * num_pairs], hay, ids[2 * num_pairs :]]))
    return [_score(subject, rows, num_pairs, {"num_pairs": num_pairs, "length": length}, advance)]


def _score(subject: Subject, rows: Sequence[np.ndarray], num_pairs: int, at: dict[str, float], advance: Advance) -> Cell:
    ids = np.stack(rows).astype(np.int64)
    scores = subject.score(ids, 2 * num_pairs, advance)
    # The second half alternates k v k v ...: the values are the answers.
    correct, nats = scores.correct[:, 1::2], scores.nats[:, 1::2]
    asked = np.full(len(ids), num_pairs)
    return make_cell(ACCURACY, at, correct.sum(1), asked, digest(list(ids)), {"answer_nats": float(nats.mean())})
