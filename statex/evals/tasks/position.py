"""Bits per byte by position in a long window: whether a model goes on gaining from what it has read."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..result import BITS_PER_BYTE, Cell, digest, make_cell
from ..task import Advance, Context, Job, Schedule
from .perplexity import Span, draw_spans

if TYPE_CHECKING:
    from ..subject import Subject

FIRST = 64
"""The first group of positions ends here; each of the others ends at twice its beginning."""


class PerplexityByPosition:
    """Windows of the longest length, their bytes sorted by how many tokens stand before them."""

    name = "perplexity_by_position"
    needs_data = True

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` without text, or where no document fills a window."""
        length = max(context.options.lengths)
        if length <= FIRST:
            raise EvaluationError(f"a window of {length} tokens has one group", where="lengths", fix=f"Give a length above {FIRST}")
        spans = [span for span in draw_spans(context, length, self.name) if len(span[0]) == length]
        notes = (
            f"text: {context.source}; {len(spans)} windows of {length} tokens, each from an empty state",
            "a position stands for the tokens from half of it (the first: from 1) up to it",
        )
        jobs = [Job(f"{length} tokens", len(spans), partial(_run, length, spans))]
        return Schedule(jobs, {"position": "position in the window (tokens)"}, BITS_PER_BYTE, notes=notes)


def _run(length: int, spans: list[Span], subject: Subject, advance: Advance) -> list[Cell]:
    nats = subject.score(np.stack([ids for ids, _ in spans]), length - 1, advance).nats
    sizes, inputs = np.stack([sizes for _, sizes in spans])[:, 1:], digest([ids for ids, _ in spans])
    borders = [1]
    while borders[-1] < length:
        borders.append(min(length, max(FIRST, 2 * borders[-1])))
    cells = []
    for start, stop in pairwise(borders):
        group = slice(start - 1, stop - 1)
        bits = nats[:, group].sum(1) / math.log(2)
        cells.append(make_cell(BITS_PER_BYTE, {"position": stop}, bits, sizes[:, group].sum(1), inputs))
    return cells
