"""Language modelling on held-out text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EvaluationError
from ..result import BITS_PER_BYTE, Cell, digest, make_cell
from ..task import Advance, Context, Job, Schedule
from ..text import byte_offsets, start_ids

if TYPE_CHECKING:
    from ..subject import Subject

MAX_CHARACTERS = 20_000_000
"""Of larger data only every second, third ... document is tokenized: the windows are a sample anyhow."""


class Perplexity:
    """Bits per byte over windows of fixed length, comparable across tokenizers."""

    name = "perplexity"
    needs_data = True

    def schedule(self, context: Context) -> Schedule:
        lengths = sorted(set(context.options.lengths))
        if lengths[0] < 2:
            raise EvaluationError(f"a window of {lengths[0]} tokens predicts nothing", where="lengths", fix="Give lengths from 2")
        spans = draw_spans(context, lengths[-1], self.name)
        jobs = []
        for length in lengths:
            windows = [window for span in spans for window in _windows(*span, length)]
            jobs.append(Job(f"{length} tokens", len(windows), partial(_run, length, windows)))
        notes = (
            f"text: {context.source}; the same {len(spans)} stretches at every length",
            "fixed-length windows without overlap or carried state: each begins with an empty state and the last token before it",
            "the interval is over windows of this text; it does not cover the choice of text",
        )
        return Schedule(jobs, {"length": "window (tokens)"}, BITS_PER_BYTE, notes=notes)


Span = tuple[np.ndarray, np.ndarray]
"""Token ids `[T]` and the UTF-8 bytes `[T]` that each stands for; the first is context only and is not predicted."""


def draw_spans(context: Context, length: int, task: str) -> list[Span]:
    """At most `samples` stretches of up to `length` predicted tokens, evenly spread over the documents.

    Raises:
        EvaluationError: no text, or no document as long.
    """
    if not context.documents:
        raise EvaluationError(f"{task} needs text", where="data", fix=f"Give --data FILE, or leave {task} out of --tasks")
    start = start_ids(context.tokenizer)
    spans: list[Span] = []
    for document in context.documents[:: math.ceil(sum(map(len, context.documents)) / MAX_CHARACTERS)]:
        ids, sizes = byte_offsets(context.tokenizer, document)
        if len(start):
            ids, sizes = np.concatenate([start[-1:], ids]), np.concatenate([[0], sizes])
        spans += [(ids[at : at + length], sizes[at : at + length]) for at in range(0, len(ids) - 1, length - 1)]
    count = min(context.options.samples, len(spans))
    found = [spans[(2 * i + 1) * len(spans) // (2 * count)] for i in range(count)]
    if (longest := max(len(ids) for ids, _ in found)) < length:
        raise EvaluationError(
            f"no document has {length} tokens, the longest has {longest}",
            where=context.source,
            fix="Give longer documents or shorter lengths",
        )
    return found


def _windows(ids: np.ndarray, sizes: np.ndarray, length: int) -> list[Span]:
    """Cut a stretch into windows of `length` tokens that share one token: the last of a window is the context of the next."""
    return [(ids[at : at + length], sizes[at : at + length]) for at in range(0, len(ids) - 1, length - 1)]


def _run(length: int, windows: list[Span], subject: Subject, advance: Advance) -> list[Cell]:
    nats, sizes = np.zeros(len(windows)), np.array([window_sizes[1:].sum() for _, window_sizes in windows])
    lengths = np.array([len(ids) for ids, _ in windows])
    # Only the last window of a document is shorter; rows of a batch are equally long.
    for size in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == size)
        nats[rows] = subject.score(np.stack([windows[row][0] for row in rows]), size - 1, advance).nats.sum(1)
    tokens = int((lengths - 1).sum())
    loss = float(nats.sum() / tokens)
    extra = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
    return [make_cell(BITS_PER_BYTE, {"length": length}, nats / math.log(2), sizes, digest([ids for ids, _ in windows]), extra)]
