"""What passkey and needle-in-a-haystack share: hide a sentence at a depth of a text of exact length, ask for its value.

All prompts of one length have the same number of tokens, so that batches need no padding. The value is tokenized once and the same
ids stand in the needle and in the answer, so no tokenizer can split them differently. All depths of a sample share text and needle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..result import ACCURACY, Cell, digest, make_cell
from ..task import Advance, Context, Job, Schedule
from ..text import encode, sentence_borders, start_ids

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
        EvaluationError: a depth outside 0 to 1, a prompt too short for needle and question, or a haystack shorter than asked.
    """
    options = context.options
    for depth in options.depths:
        if not 0 <= depth <= 1:
            raise EvaluationError(
                f"depth {depth} is outside 0 to 1", where="depths", fix="Give fractions of the text, 0.5 for its middle"
            )
    lengths, depths = sorted(set(options.lengths)), sorted(set(options.depths))
    for length, row in [(lengths[-1], 0), *((lengths[0], row) for row in range(options.samples))]:
        _prompts(context, draw_needle, draw_hay, length, depths[:1], context.rng(name, length, row))
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
    drawn = [_prompts(context, draw_needle, draw_hay, length, depths, context.rng(name, length, row)) for row in range(samples)]
    ids = np.stack([prompts for prompts, _ in drawn])
    sizes = np.array([size for _, size in drawn])
    keep = int(sizes.max())
    flat = subject.score(ids.reshape(-1, length), keep, advance)
    in_answer = np.arange(keep) >= keep - sizes[:, None, None]
    shape = (samples, len(depths), keep)
    right = np.all(flat.correct.reshape(shape) | ~in_answer, axis=-1)
    nats = np.where(in_answer, flat.nats.reshape(shape), 0).sum(-1)
    return [
        make_cell(
            ACCURACY,
            {"length": length, "depth": depth},
            right[:, column],
            np.ones(samples, dtype=int),
            digest(list(ids[:, column])),
            {"answer_nats": float(nats[:, column].mean())},
        )
        for column, depth in enumerate(depths)
    ]


def _prompts(
    context: Context, draw_needle: DrawNeedle, draw_hay: DrawHay, length: int, depths: list[float], rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """One sample's prompts with answer `[depths, length]` and the tokens of the answer."""
    needle = draw_needle(rng)
    start, before, value, after, question = (
        start_ids(context.tokenizer),
        *(encode(context.tokenizer, part) for part in (needle.before, needle.value, needle.after, needle.question)),
    )
    hidden = np.concatenate([before, value, after])
    room = length - len(start) - len(hidden) - len(question) - len(value)
    if room < 0:
        raise EvaluationError(
            f"a prompt of {length} tokens has no room for the needle and its question",
            where="lengths",
            fix=f"Give lengths from {length - room}",
        )
    hay = draw_hay(room, rng) if room else np.empty(0, dtype=np.int64)
    borders = sentence_borders(context.tokenizer, hay)
    rows = []
    for depth in depths:
        place = _nearest(borders, round(depth * room), room)
        rows.append(np.concatenate([start, hay[:place], hidden, hay[place:], question, value]))
    return np.stack(rows), len(value)


def _nearest(borders: np.ndarray, target: int, room: int) -> int:
    """The sentence border nearest to a target; the ends count as borders, so depths 0 and 1 are exact."""
    candidates = np.concatenate([[0], borders, [room]])
    return int(candidates[np.abs(candidates - target).argmin()])
