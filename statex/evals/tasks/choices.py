"""Common sense and the last words of passages, from local files: the guard that expansion does no harm.

Continuations are scored as lm-eval does: context and continuation are tokenized together, the continuation's log-probability is
summed, and divided by its characters where the literature reports that.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EvaluationError
from ..result import ACCURACY, Cell, digest, make_cell
from ..sources import ARC_CHALLENGE, ARC_EASY, HELLASWAG, LAMBADA, PIQA, WINOGRANDE, Source
from ..stems import stem_of
from ..task import Advance, Context, Job, Schedule
from ..text import Encoder, encode, start_ids

if TYPE_CHECKING:
    from ..subject import Subject

UNCONDITIONED = 1_000_000
"""From this number on, the package's requests score a choice without its question."""


class Choices:
    """Questions with choices, one of which continues its context best."""

    needs_data = False

    def __init__(self, name: str, source: Source, *, by_character: bool) -> None:
        self.name, self.source, self.by_character = name, source, by_character

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` where the data are missing or are other than expected."""
        questions: dict[int, list[dict[str, Any]]] = {}
        for row in self.source.read(context.options.data_dir):
            if row["doc_id"] < UNCONDITIONED:
                questions.setdefault(row["doc_id"], []).append(row)
        chosen = _sample(context, self.name, list(questions.values()))
        rows = sum(len(question) for question in chosen)
        chance = float(np.mean([1 / len(question) for question in chosen]))
        how = "per character" if self.by_character else "as a whole"
        notes = (
            f"no examples; the choice with the highest log-probability {how} counts",
            f"{len(chosen)} of {len(questions)} questions",
        )
        jobs = [Job("choices", rows, partial(self._run, context, chosen))]
        return Schedule(jobs, {"shots": "examples in the prompt"}, ACCURACY, chance=chance, notes=notes)

    def _run(self, context: Context, questions: list[list[dict[str, Any]]], subject: Subject, advance: Advance) -> list[Cell]:
        pairs = [[(row["request"]["context"], row["request"]["continuation"]) for row in question] for question in questions]
        stems = [stem_of([encode_pair(context.tokenizer, *pair) for pair in each]) for each in pairs]
        scores = subject.score_stems(stems, advance)
        whole, by_character = [], []
        for question, each, row in zip(questions, pairs, scores, strict=True):
            nats = np.array([score.nats.sum() for score in row])
            sizes = np.array([len(continuation.strip()) for _, continuation in each])
            whole.append(int(nats.argmin()) == question[0]["label"])
            by_character.append(int((nats / sizes).argmin()) == question[0]["label"])
        main, other = (by_character, whole) if self.by_character else (whole, by_character)
        extra = {"accuracy_as_a_whole" if self.by_character else "accuracy_per_character": float(np.mean(other))}
        inputs = digest(stem.whole(row) for stem in stems for row in stem.rows)
        return [make_cell(ACCURACY, {"shots": 0}, np.array(main), np.ones(len(main), dtype=int), inputs, extra)]


class Lambada:
    """The last word of a passage, which needs its whole context (arXiv 1606.06031); all its tokens must be the most likely ones."""

    name = "lambada"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` where the data are missing."""
        rows = LAMBADA.read(context.options.data_dir)
        chosen = _sample(context, self.name, rows)
        notes = ("no examples; the whole last word must be the most likely", f"{len(chosen)} of {len(rows)} passages")
        jobs = [Job("passages", len(chosen), partial(self._run, context, chosen))]
        return Schedule(jobs, {"shots": "examples in the prompt"}, ACCURACY, notes=notes)

    def _run(self, context: Context, rows: list[dict[str, Any]], subject: Subject, advance: Advance) -> list[Cell]:
        requests = [row["request"] for row in rows]
        stems = [stem_of([encode_pair(context.tokenizer, r["context"], r["continuation"])]) for r in requests]
        scores = [row[0] for row in subject.score_stems(stems, advance)]
        right = np.array([score.correct.all() for score in scores])
        perplexity = float(np.exp(min(700.0, float(np.mean([score.nats.sum() for score in scores])))))
        inputs = digest(stem.whole(stem.rows[0]) for stem in stems)
        return [make_cell(ACCURACY, {"shots": 0}, right, np.ones(len(right), dtype=int), inputs, {"perplexity": perplexity})]


def _sample(context: Context, name: str, questions: list[Any]) -> list[Any]:
    if not questions:
        raise EvaluationError("the file has no questions", where=name, fix="Fetch it again")
    return [questions[i] for i in context.rng(name).permutation(len(questions))[: context.options.samples]]


def encode_pair(tokenizer: Encoder, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """Token ids of a context with its continuation, and how many of them are the continuation's."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole, before = encode(tokenizer, stripped + continuation), encode(tokenizer, stripped)
    start = start_ids(tokenizer)
    ids = np.concatenate([start, whole])
    # The first token of all has nothing before it that could predict it.
    return ids, min(max(1, len(whole) - len(before)), len(ids) - 1)


CHOICES: tuple[Choices, ...] = (
    Choices("hellaswag", HELLASWAG, by_character=True),
    Choices("piqa", PIQA, by_character=False),
    Choices("arc_easy", ARC_EASY, by_character=False),
    Choices("arc_challenge", ARC_CHALLENGE, by_character=True),
    Choices("winogrande", WINOGRANDE, by_character=False),
)
