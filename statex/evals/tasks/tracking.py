"""State tracking: parity, modular arithmetic and words over groups, at lengths beyond those of training (arXiv 2411.12537)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..result import ACCURACY, Cell, digest, make_cell
from ..task import Advance, Context, Job, Schedule
from ..text import start_ids
from ..tracking_rows import PROBLEMS, Problem, draw_row, symbol_ids

if TYPE_CHECKING:
    from ..subject import Subject


LENGTHS = (40, 64, 128, 256)
"""Symbols of a row, unless the user chose. The paper's training ends at 40; beyond, only a model that tracks the state goes on."""


class Tracking:
    """Rows of symbols; scored is the answer after the last one, at the last symbol's own position, as `recipes` trains it."""

    needs_data = False

    def __init__(self, problem: Problem) -> None:
        self.name, self.problem = problem.name, problem

    def schedule(self, context: Context) -> Schedule:
        try:
            vocabulary = symbol_ids(context.tokenizer)
        except ValueError as error:
            raise EvaluationError(str(error), where="tokenizer", fix=f"Leave {self.name} out for this checkpoint") from error
        options, problem = context.options, self.problem
        lengths = sorted(set(options.lengths if options.lengths_given else LENGTHS))
        if lengths[0] < problem.shortest:
            what = f"{self.name} is asked for at {lengths[0]} symbols and has rows of {problem.shortest} and more"
            raise EvaluationError(what, where="lengths", fix=f"Ask for {problem.shortest} or more")
        jobs = [Job(f"{length} symbols", options.samples, partial(self._run, context, vocabulary, length)) for length in lengths]
        notes = (f"{problem.symbols} symbols, {problem.answers} answers; the answer after the last symbol of a row", *problem.notes)
        return Schedule(jobs, {"length": "symbols"}, ACCURACY, chance=1 / problem.answers, notes=notes)

    def _run(self, context: Context, vocabulary: np.ndarray, length: int, subject: Subject, advance: Advance) -> list[Cell]:
        start, samples = start_ids(context.tokenizer), context.options.samples
        drawn = [draw_row(self.problem, vocabulary, length, context.rng(self.name, length, row))[0] for row in range(samples)]
        ids = np.stack([np.concatenate([start, row]) for row in drawn]).astype(np.int64)
        scores = subject.score(ids, 1, advance)
        cell = make_cell(
            ACCURACY, {"length": length}, scores.correct.sum(1), np.ones(samples, dtype=int), digest(list(ids)),
            {"answer_nats": float(scores.nats.mean())},
        )  # fmt: skip
        return [cell]


TRACKING = tuple(Tracking(problem) for problem in PROBLEMS.values())
"""One task a problem."""
