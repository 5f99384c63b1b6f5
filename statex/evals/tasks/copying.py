"""Copying a string of random tokens (arXiv 2402.01032): how long a text the state can hold word for word."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..mqar_rows import token_pools
from ..result import ACCURACY, Cell, digest, make_cell
from ..task import Advance, Context, Job, Schedule
from ..text import start_ids

if TYPE_CHECKING:
    from ..subject import Subject


class Copying:
    """Random tokens, then the same again; one forward pass scores the copy."""

    name = "copying"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` for rows too short to hold two strings."""
        lengths = sorted(set(context.options.lengths))
        if lengths[0] < 8:
            raise EvaluationError(
                f"a row of {lengths[0]} tokens is too short to copy in", where="lengths", fix="Give lengths from 8"
            )
        pools = token_pools(context.tokenizer)
        ids = np.concatenate([pools.keys, pools.values])
        jobs = [Job(f"{n} tokens", context.options.samples, partial(_run, context, ids, n)) for n in lengths]
        notes = (
            f"strings of {len(ids)} token ids drawn at random, half as long as --lengths say",
            "each token of the copy is asked for after the right ones before it; the first, which nothing announces, is not",
        )
        return Schedule(jobs, {"num_items": "copied tokens"}, ACCURACY, chance=1 / len(ids), notes=notes)


def _run(context: Context, pool: np.ndarray, length: int, subject: Subject, advance: Advance) -> list[Cell]:
    start, size = start_ids(context.tokenizer), length // 2
    strings = [context.rng(Copying.name, length, row).choice(pool, size) for row in range(context.options.samples)]
    ids = np.stack([np.concatenate([start, string, string]) for string in strings]).astype(np.int64)
    scores = subject.score(ids, size - 1, advance)
    asked = np.full(len(ids), size - 1)
    extra = {"answer_nats": float(scores.nats.mean()), "whole_copies": float(scores.correct.all(1).mean())}
    return [make_cell(ACCURACY, {"num_items": size}, scores.correct.sum(1), asked, digest(list(ids)), extra)]
