"""What passkey and needle-in-a-haystack share: hide a sentence at a depth of a text of exact length, ask for its value.

All prompts of one length have the same number of tokens. The value is tokenized once and the same ids stand in the needle and in
the answer, so no tokenizer can split them differently. All depths of a sample share text and needle: where the model has states to
branch, the text before a needle is read once, and what follows the needle once for each depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..result import ACCURACY, Cell, digest, make_cell
from ..stems import Row, Stem
from ..task import Advance, Context, Job, Schedule
from ..text import encode, encode_exactly, sentence_borders, start_ids

if TYPE_CHECKING:
    from ..subject import Subject

AXES = {"length": "prompt length (tokens)", "depth": "depth of the needle"}


@dataclass(frozen=True)
class Needle:
    """A hidden sentence and its question, as text: `before value after` is hidden, `question value` is asked."""

    before: str
    value: str
    after: str
    question: str


DrawNeedle = Callable[[np.random.Generator], Needle]
DrawHay = Callable[[int, np.random.Generator], np.ndarray]


def needle_schedule(name: str, context: Context, draw_needle: DrawNeedle, draw_hay: DrawHay, notes: Sequence[str]) -> Schedule:
    """Jobs over lengths; each gives one cell a depth. A longest and all shortest prompts are built now, to fail early.

    Raises:
        EvaluationError: a depth outside 0 to 1, a prompt too short for needle and question, a haystack shorter than asked, or a
            tokenizer that cannot write the needle.
    """
    options = context.options
    for depth in options.depths:
        if not 0 <= depth <= 1:
            raise EvaluationError(
                f"depth {depth} is outside 0 to 1", where="depths", fix="Give fractions of the text, 0.5 for its middle"
            )
    lengths, depths = sorted(set(options.lengths)), sorted(set(options.depths))
    for length, row in [(lengths[-1], 0), *((lengths[0], row) for row in range(options.samples))]:
        draw_stem(context, draw_needle, draw_hay, length, depths[:1], context.rng(name, length, row))
    jobs = [
        Job(f"{length} tokens", options.samples * len(depths), partial(_run, name, context, draw_needle, draw_hay, length, depths))
        for length in lengths
    ]
    return Schedule(jobs, AXES, ACCURACY, notes=(*notes, "the whole value must match; lengths count prompt and answer"))


def _run(
    name: str,
    context: Context,
    draw_needle: DrawNeedle,
    draw_hay: DrawHay,
    length: int,
    depths: list[float],
    subject: Subject,
    advance: Advance,
) -> list[Cell]:
    samples = context.options.samples
    stems = [draw_stem(context, draw_needle, draw_hay, length, depths, context.rng(name, length, row)) for row in range(samples)]
    scores = subject.score_stems(stems, advance)
    return [
        make_cell(
            ACCURACY,
            {"length": length, "depth": depth},
            np.array([row[column].correct.all() for row in scores]),
            np.ones(samples, dtype=int),
            digest(stem.whole(stem.rows[column]) for stem in stems),
            {"answer_nats": float(np.mean([row[column].nats.sum() for row in scores]))},
        )
        for column, depth in enumerate(depths)
    ]


def draw_stem(
    context: Context, draw_needle: DrawNeedle, draw_hay: DrawHay, length: int, depths: list[float], rng: np.random.Generator
) -> Stem:
    """One sample: a stretch of text, and a row of `length` tokens for each depth, whose answer is scored."""
    needle, tokenizer = draw_needle(rng), context.tokenizer
    start = start_ids(tokenizer)
    before, value, after, question = (
        encode_exactly(tokenizer, part, "the needle") for part in (needle.before, needle.value, needle.after, needle.question)
    )
    hidden = np.concatenate([before, value, after])
    room = check_room(length - len(start) - len(hidden) - len(question) - len(value), length)
    hay = draw_hay(room, rng) if room else np.empty(0, dtype=np.int64)
    borders = sentence_borders(tokenizer, hay)
    rows = []
    for depth in depths:
        place = nearest_border(borders, round(depth * room), room)
        rows.append(Row(len(start) + place, np.concatenate([hidden, hay[place:], question, value]), len(value)))
    return Stem(np.concatenate([start, hay]), tuple(rows))


def check_room(room: int, length: int) -> int:
    """The tokens left for the haystack. Raises `EvaluationError` if there are less than none."""
    if room < 0:
        raise EvaluationError(
            f"a prompt of {length} tokens has no room for the needle and its question",
            where="lengths",
            fix=f"Give lengths from {length - room}",
        )
    return room


def nearest_border(borders: np.ndarray, target: int, room: int) -> int:
    """The sentence border nearest to a target; the ends count as borders, so depths 0 and 1 are exact."""
    candidates = np.concatenate([[0], borders, [room]])
    return int(candidates[np.abs(candidates - target).argmin()])


def book_hay(context: Context) -> tuple[DrawHay, str]:
    """How stretches of text are drawn, and a note on where they come from: the user's data, or generated sentences without any."""
    if context.documents:
        return context.haystack.draw, f"haystack: {context.source}"
    from .magic import generated_filler

    return partial(generated_filler, context), "haystack: generated sentences, since no data were given; easier than real text"


def encode_parts(context: Context, *parts: str) -> np.ndarray:
    """Token ids `[T]` of texts that are tokenized one by one, so that each has the same ids wherever it stands."""
    return np.concatenate([encode(context.tokenizer, part) for part in parts])
