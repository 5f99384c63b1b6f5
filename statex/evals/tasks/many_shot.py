"""Learning from examples in the prompt: tasks drawn at random, whose accuracy grows with the number of examples.

A stream of examples is read once; at each number of shots the questions branch from it. The answer is the most likely label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..result import ACCURACY, Cell, digest, make_cell
from ..stems import Row, Stem
from ..task import Advance, Context, Job, Schedule
from ..text import start_ids
from .magic import ADJECTIVES, NOUNS
from .needle import encode_parts

if TYPE_CHECKING:
    from ..subject import Subject

SHOTS = (2, 8, 32, 128)
QUESTIONS = 4
"""Questions a stream at each number of shots."""
COLOURS = ("blue", "gold", "grey", "pink")
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Rule:
    """A rule that one stream follows: it writes an input (`text ->`) and knows its label's index."""

    draw: Callable[[np.random.Generator], tuple[str, int]]


def draw_classes(rng: np.random.Generator) -> Rule:
    """Every noun belongs to one of four colours, in equal parts; an input is a noun with an adjective that tells nothing."""
    colour = rng.permutation(len(NOUNS)) % len(COLOURS)

    def draw(rng: np.random.Generator) -> tuple[str, int]:
        noun = int(rng.integers(len(NOUNS)))
        return f"{rng.choice(ADJECTIVES)} {NOUNS[noun]} ->", int(colour[noun])

    return Rule(draw)


def draw_curve(rng: np.random.Generator) -> Rule:
    """A rising or falling curve from 0 .. 99 to a digit; over all curves each digit is as frequent as any other, nearly."""
    power, falls = 2.0 ** rng.uniform(-1, 1), rng.random() < 0.5

    def draw(rng: np.random.Generator) -> tuple[str, int]:
        x = int(rng.integers(100))
        height = ((x + 0.5) / 100) ** power
        return f"{x:02d} ->", int(10 * (1 - height if falls else height))

    return Rule(draw)


class ManyShot:
    """Accuracy by number of examples."""

    needs_data = False

    def __init__(self, name: str, labels: tuple[str, ...], draw_rule: Callable[[np.random.Generator], Rule], note: str) -> None:
        self.name, self.labels, self.note = name, labels, note
        self._draw_rule = draw_rule

    def schedule(self, context: Context) -> Schedule:
        shots = sorted(set(context.options.shots or SHOTS))
        rows = context.options.samples * len(shots) * QUESTIONS * len(self.labels)
        notes = (self.note, f"{QUESTIONS} questions a stream; the most likely of the {len(self.labels)} labels counts")
        jobs = [Job(f"{shots[-1]} shots", rows, partial(self._run, context, shots))]
        return Schedule(jobs, {"shots": "examples in the prompt"}, ACCURACY, chance=1 / len(self.labels), notes=notes)

    def draw(self, context: Context, shots: list[int], row: int) -> tuple[Stem, np.ndarray]:
        """One stream as a stem, and the right labels `[shots, questions]`; rows run over shots, questions, labels."""
        rng = context.rng(self.name, row)
        rule, pieces = self._draw_rule(rng), [start_ids(context.tokenizer)]
        for _ in range(shots[-1]):
            text, label = rule.draw(rng)
            pieces.append(encode_parts(context, text, f" {self.labels[label]}", "\n"))
        places = np.cumsum([len(piece) for piece in pieces]).tolist()
        rows, right = [], np.zeros((len(shots), QUESTIONS), dtype=int)
        for line, number in zip(right, shots, strict=True):
            for question in range(QUESTIONS):
                text, label = rule.draw(rng)
                line[question] = label
                for word in self.labels:
                    answer = encode_parts(context, f" {word}")
                    rows.append(Row(places[number], np.concatenate([encode_parts(context, text), answer]), len(answer)))
        return Stem(np.concatenate(pieces), tuple(rows)), right

    def _run(self, context: Context, shots: list[int], subject: Subject, advance: Advance) -> list[Cell]:
        drawn = [self.draw(context, shots, row) for row in range(context.options.samples)]
        stems = [stem for stem, _ in drawn]
        scores = subject.score_stems(stems, advance)
        shape = (len(drawn), len(shots), QUESTIONS, len(self.labels))
        nats = np.array([score.nats.sum() for row in scores for score in row]).reshape(shape)
        chosen, right = nats.argmin(-1), np.stack([labels for _, labels in drawn])
        cells = []
        for column, number in enumerate(shots):
            hits, each = chosen[:, column] == right[:, column], QUESTIONS * len(self.labels)
            extra = {}
            if self.labels == DIGITS:
                extra["mean_absolute_error"] = float(np.abs(chosen[:, column] - right[:, column]).mean())
            inputs = digest(stem.whole(row) for stem in stems for row in stem.rows[column * each : (column + 1) * each])
            cells.append(make_cell(ACCURACY, {"shots": number}, hits.sum(1), np.full(len(hits), QUESTIONS), inputs, extra))
        return cells


MANY_SHOT = (
    ManyShot("icl_classification", COLOURS, draw_classes, "every noun has a colour, drawn anew for each stream"),
    ManyShot("icl_regression", DIGITS, draw_curve, "a curve from two digits to one, drawn anew for each stream"),
)
