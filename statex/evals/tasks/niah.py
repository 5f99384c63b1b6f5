"""Needles in a haystack of real text, in the forms of RULER (arXiv 2404.06654), with numbers, words and UUIDs as values.

| form | hidden | asked |
|---|---|---|
| single | one needle, at each depth | its value |
| multikey | needles with keys of their own | every key's value, each by itself, from one reading of the text |
| multivalue | needles with one key | all values, in free text |
| multiquery | needles with keys of their own | all values, in free text |
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..result import ACCURACY, Cell, digest, make_cell
from ..stems import Row, Stem
from ..task import Advance, Context, Job, Schedule, Task
from ..text import encode_exactly, sentence_borders, start_ids
from .magic import ADJECTIVES, NOUNS, NUMBERS, VALUES, Values
from .needle import DrawHay, Needle, book_hay, check_room, needle_schedule

if TYPE_CHECKING:
    from ..subject import Subject

AXES = {"length": "prompt length (tokens)"}
MOST_NEEDLES = len(ADJECTIVES) * len(NOUNS)


class NeedleInAHaystack:
    """Find the value of one word in book text."""

    needs_data = False

    def __init__(self, values: Values = NUMBERS) -> None:
        self.name = "niah" if values is NUMBERS else f"niah_{values.plural}"
        self.values = values

    def schedule(self, context: Context) -> Schedule:
        draw_hay, note = book_hay(context)
        return needle_schedule(self.name, context, partial(draw_needle, values=self.values), draw_hay, [note])


def draw_needle(rng: np.random.Generator, values: Values = NUMBERS) -> Needle:
    """A needle with a value for a word."""
    word, value = rng.choice(NOUNS), values.draw(rng)
    return Needle(
        f" One of the special magic {values.plural} for {word} is:",
        value,
        ".",
        f" What is the special magic {values.plural[:-1]} for {word} mentioned in the text?"
        f" One of the special magic {values.plural} for {word} is:",
    )


class ManyNeedles:
    """Find the values of several needles in book text.

    Args:
        form: `multikey`, `multivalue` or `multiquery`.
    """

    needs_data = False

    def __init__(self, form: str, values: Values) -> None:
        self.name = f"niah_{form}" if values is NUMBERS else f"niah_{form}_{values.plural}"
        self.form, self.values = form, values

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` as `needle_schedule`, and for a number of needles that cannot be told apart."""
        options = context.options
        if not 2 <= options.needles <= MOST_NEEDLES:
            raise EvaluationError(
                f"{options.needles} needles are asked for", where="needles", fix=f"Give a number from 2 to {MOST_NEEDLES}"
            )
        draw_hay, note = book_hay(context)
        lengths = self._lengths_with_room(context, draw_hay)
        ask = self._ask_each if self.form == "multikey" else self._ask_all
        rows = options.samples * (options.needles if self.form == "multikey" else 1)
        jobs = [Job(f"{length} tokens", rows, partial(ask, context, draw_hay, length)) for length in lengths]
        kind = "each asked by itself" if self.form == "multikey" else "all asked at once; a value counts if the answer holds it"
        notes = [note, f"{options.needles} needles a text, {kind}"]
        if left_out := sorted(set(options.lengths) - set(lengths)):
            notes.append(f"too short for the needles and their question, left out: {', '.join(map(str, left_out))} tokens")
        return Schedule(jobs, AXES, ACCURACY, notes=tuple(notes))

    def _lengths_with_room(self, context: Context, draw_hay: DrawHay) -> list[int]:
        """Lengths that hold the needles of all samples; the longest is tried first, and must."""
        lengths = sorted(set(context.options.lengths))
        self.draw(context, draw_hay, lengths[-1], 0)

        def bare(length: int, rng: np.random.Generator) -> np.ndarray:
            return np.zeros(length, dtype=np.int64)

        for length in lengths[:-1]:
            with suppress(EvaluationError):
                for row in range(context.options.samples):
                    self.draw(context, bare, length, row)
                return lengths[lengths.index(length) :]
        return lengths[-1:]

    def draw(self, context: Context, draw_hay: DrawHay, length: int, row: int) -> tuple[Stem, list[str]]:
        """One sample as a stem with a row for each question, and the values as text."""
        rng, tokenizer = context.rng(self.name, length, row), context.tokenizer
        count, start = context.options.needles, start_ids(context.tokenizer)
        keys = _draw_keys(count, rng) if self.form != "multivalue" else _draw_keys(1, rng) * count
        values = _distinct_values(self.values, count, rng)
        part = partial(encode_exactly, tokenizer, what="the needle")
        sentences = [part(f" One of the special magic {self.values.plural} for {key} is:") for key in keys]
        answers, stop = [part(value) for value in values], part(".")
        hidden = [np.concatenate([sentence, value, stop]) for sentence, value in zip(sentences, answers, strict=True)]
        questions = [part(text) for text in self._questions(keys)]
        longest = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=False))
        room = check_room(length - len(start) - sum(map(len, hidden)) - longest, length)
        hay = draw_hay(room, rng) if room else np.empty(0, dtype=np.int64)
        borders = np.concatenate([[0], sentence_borders(tokenizer, hay), [room]])
        places = np.sort(borders[rng.integers(0, len(borders), count)])
        pieces = [piece for text, needle in zip(np.split(hay, places), hidden, strict=False) for piece in (text, needle)]
        ids = np.concatenate([start, *pieces, hay[places[-1] :]])
        rows = [Row(len(ids), np.concatenate([q, a]), len(a)) for q, a in zip(questions, answers, strict=False)]
        return Stem(ids, tuple(rows)), values

    def _questions(self, keys: list[str]) -> list[str]:
        plural = self.values.plural
        if self.form == "multikey":
            return [
                f" What is the special magic {plural[:-1]} for {key} mentioned in the text?"
                f" One of the special magic {plural} for {key} is:"
                for key in keys
            ]
        named = list(dict.fromkeys(keys))
        those = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
        asked = f" What are all the special magic {plural} for {those} mentioned in the text?"
        return [f"{asked} The special magic {plural} for {those} mentioned in the text are"]

    def _ask_each(self, context: Context, draw_hay: DrawHay, length: int, subject: Subject, advance: Advance) -> list[Cell]:
        stems = [self.draw(context, draw_hay, length, row)[0] for row in range(context.options.samples)]
        scores = subject.score_stems(stems, advance)
        right = np.array([sum(bool(score.correct.all()) for score in row) for row in scores])
        nats = float(np.mean([score.nats.sum() for row in scores for score in row]))
        inputs = digest(stem.whole(row) for stem in stems for row in stem.rows)
        asked = np.full(len(stems), context.options.needles)
        return [make_cell(ACCURACY, {"length": length}, right, asked, inputs, {"answer_nats": nats})]

    def _ask_all(self, context: Context, draw_hay: DrawHay, length: int, subject: Subject, advance: Advance) -> list[Cell]:
        drawn = [self.draw(context, draw_hay, length, row) for row in range(context.options.samples)]
        prompts = [np.concatenate([stem.ids, stem.rows[0].tail[: -stem.rows[0].keep]]) for stem, _ in drawn]
        # Room for every value and as many tokens again for the words between them.
        most = 2 * max(len(stem.rows[0].tail[-stem.rows[0].keep :]) for stem, _ in drawn) * context.options.needles
        told = subject.generate(prompts, max_new_tokens=most, advance=advance)
        right = np.array([sum(value.strip() in text for value in values) for text, (_, values) in zip(told, drawn, strict=True)])
        asked = np.full(len(drawn), context.options.needles)
        return [make_cell(ACCURACY, {"length": length}, right, asked, digest(prompts))]


def _draw_keys(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct pairs of an adjective and a noun."""
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]} {NOUNS[i // len(ADJECTIVES)]}" for i in rng.permutation(MOST_NEEDLES)[:count]]


def _distinct_values(values: Values, count: int, rng: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[values.draw(rng)] = None
    return list(found)


NEEDLES: tuple[Task, ...] = (
    *(NeedleInAHaystack(values) for values in VALUES),
    *(ManyNeedles(form, values) for form in ("multikey", "multivalue", "multiquery") for values in VALUES),
)
"""Every form with every kind of value."""
