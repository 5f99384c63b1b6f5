"""MQAR: how many key-value pairs the state can hold (arXiv 2312.04927)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..mqar_rows import Pools, draw_row, token_pools
from ..result import ACCURACY, Cell, digest, make_cell
from ..task import Advance, Context, Job, Schedule
from ..text import start_ids

if TYPE_CHECKING:
    from ..subject import Subject


class MQAR:
    """Rows of n key-value pairs followed by all n queries; one forward pass scores the n answers of a row."""

    name = "mqar"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        pools = token_pools(context.tokenizer)
        for num_pairs in context.options.num_pairs:
            if not 1 <= num_pairs <= len(pools.keys):
                raise EvaluationError(
                    f"{num_pairs} pairs are asked for, the vocabulary gives 1 to {len(pools.keys)} distinct keys",
                    where="num_pairs",
                    fix="Ask for a number in that range",
                )
        jobs = [
            Job(f"{num_pairs} pairs", context.options.samples, partial(_run, context, pools, num_pairs))
            for num_pairs in sorted(set(context.options.num_pairs))
        ]
        note = (
            f"keys from {len(pools.keys)} token ids, values from {len(pools.values)}; a row is n pairs, then n queries (4n tokens)"
        )
        return Schedule(jobs, {"num_pairs": "key-value pairs"}, ACCURACY, chance=1 / len(pools.values), notes=(note,))


def _run(context: Context, pools: Pools, num_pairs: int, subject: Subject, advance: Advance) -> list[Cell]:
    start = start_ids(context.tokenizer)
    drawn = [draw_row(pools, num_pairs, context.rng(MQAR.name, num_pairs, row))[0] for row in range(context.options.samples)]
    ids = np.stack([np.concatenate([start, row]) for row in drawn]).astype(np.int64)
    scores = subject.score(ids, 2 * num_pairs, advance)
    # The second half alternates k v k v ...: the values are the answers.
    correct, nats = scores.correct[:, 1::2], scores.nats[:, 1::2]
    asked = np.full(len(ids), num_pairs)
    extra = {"answer_nats": float(nats.mean())}
    return [make_cell(ACCURACY, {"num_pairs": num_pairs}, correct.sum(1), asked, digest(list(ids)), extra)]
