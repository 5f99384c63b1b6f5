"""Questions on a passage that the prompt holds, in few-shot prompts for base models: SQuAD, NQ with its gold passage, DROP.

Answers are generated greedily up to the end of the line. They count if they contain a right answer; F1 is reported beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EvaluationError
from ..answers import Accepted, contains, f1
from ..result import ACCURACY, Cell, digest, make_cell
from ..sources import DROP, NQ, SQUAD, Source
from ..statistics import ratio
from ..task import Advance, Context, Job, Schedule
from ..text import encode, start_ids

if TYPE_CHECKING:
    from ..subject import Subject

SHOTS = (2,)
ANSWER_TOKENS = 48
"""Tokens of an answer at most, as in lm-eval; more where a right answer of the sample is longer than half of that."""


@dataclass(frozen=True)
class Question:
    """A prompt up to its answer, and the right answers; the first is what examples show."""

    prompt: str
    accepted: Accepted

    @property
    def example(self) -> str:
        """Prompt and answer, as a shot."""
        return f"{self.prompt} {', '.join(self.accepted[0])}\n\n"


class Reading:
    """A question set with a passage to each question."""

    needs_data = False

    def __init__(
        self, name: str, source: Source, question: Callable[[dict[str, Any]], Question], *, whole_words: bool = False
    ) -> None:
        self.name, self.source, self.whole_words = name, source, whole_words
        self._question = question

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` where the data are missing or are other than expected."""
        rows = self.source.read(context.options.data_dir)
        try:
            questions = [self._question(row) for row in rows]
        except (KeyError, IndexError, TypeError) as error:
            raise EvaluationError(
                f"a row of {self.name} lacks a field ({error})",
                where=str(self.source.find(context.options.data_dir)),
                fix=self.source.fix,
            ) from error
        shots = sorted(set(context.options.shots or SHOTS))
        asked, examples = _split(context, self.name, questions, shots[-1])
        jobs = [Job(f"{n} shots", len(asked), partial(self._run, context, asked, examples[:n], n)) for n in shots]
        how = ", as whole words" if self.whole_words else ""
        notes = (
            f"an answer counts if it contains a right one{how}; F1 is SQuAD's, over words",
            f"{len(asked)} of {len(questions)} questions; the examples are among the others",
        )
        return Schedule(jobs, {"shots": "examples in the prompt"}, ACCURACY, notes=notes)

    def _run(
        self, context: Context, asked: list[Question], examples: list[Question], shots: int, subject: Subject, advance: Advance
    ) -> list[Cell]:
        shown = [encode(context.tokenizer, question.example) for question in examples]
        header = np.concatenate([start_ids(context.tokenizer), *shown])
        prompts = [encode(context.tokenizer, question.prompt) for question in asked]
        told = subject.generate(prompts, max_new_tokens=answer_tokens(context, asked), header=header, advance=advance)
        inputs = digest([header, *prompts])
        return [answer_cell({"shots": shots}, [told], [asked], inputs, whole_words=self.whole_words)]


def _split(context: Context, name: str, questions: list[Question], shots: int) -> tuple[list[Question], list[Question]]:
    """What is asked, and the examples. Raises `EvaluationError` if there are too few questions for both."""
    order = context.rng(name).permutation(len(questions))
    if len(questions) <= shots:
        raise EvaluationError(
            f"{shots} examples are asked for, there are {len(questions)} questions in all", where=name, fix="Ask for fewer --shots"
        )
    asked = order[shots : shots + context.options.samples]
    return [questions[i] for i in asked], [questions[i] for i in order[:shots]]


def answer_tokens(context: Context, asked: list[Question]) -> int:
    """Room for twice the shortest right answer of any question."""
    longest = max(min(len(encode(context.tokenizer, " ".join(spans))) for spans in q.accepted) for q in asked)
    return max(ANSWER_TOKENS, 2 * longest)


def answer_cell(
    at: dict[str, float], told: list[list[str]], asked: list[list[Question]], inputs: str, *, whole_words: bool = False
) -> Cell:
    """A cell of documents with their answers and questions; a single document's questions count as rows of their own."""
    right = [
        [contains(t, q.accepted, whole_words=whole_words) for t, q in zip(*each, strict=True)]
        for each in zip(told, asked, strict=True)
    ]
    overlap = [[f1(t, q.accepted) for t, q in zip(*each, strict=True)] for each in zip(told, asked, strict=True)]
    if len(told) == 1:
        right, overlap = [[x] for x in right[0]], [[x] for x in overlap[0]]
    asked_each = np.array([len(row) for row in right])
    mean = ratio([sum(row) for row in overlap], asked_each.tolist())
    extra = {"f1": mean.value}
    if np.isfinite(mean.low):
        extra |= {"f1_low": max(0.0, mean.low), "f1_high": min(1.0, mean.high)}
    return make_cell(ACCURACY, at, np.array([sum(row) for row in right]), asked_each, inputs, extra)


def squad_question(row: dict[str, Any]) -> Question:
    """A paragraph, its article's title and a question."""
    title = row["title"].replace("_", " ")
    prompt = f"Title: {title}\nBackground: {row['context'].strip()}\nQuestion: {row['question'].strip()}\nAnswer:"
    return Question(prompt, [[answer] for answer in dict.fromkeys(row["answers"])])


def nq_question(row: dict[str, Any]) -> Question:
    """A search query and the passage that answers it."""
    passage = next((each for each in row["ctxs"] if each.get("isgold")), row["ctxs"][0])
    question = row["question"].strip()
    prompt = f"Title: {passage['title']}\nBackground: {passage['text'].strip()}\nQuestion: {question}?\nAnswer:"
    return Question(prompt, [[answer] for answer in row["answers"]])


def drop_question(row: dict[str, Any]) -> Question:
    """A passage and a question that may need counting; an answer can be a list."""
    doc = row["doc"]
    prompt = f"Background: {doc['passage'].strip()}\nQuestion: {doc['question'].strip()}\nAnswer:"
    return Question(prompt, [list(spans) for spans in doc["answers"]])


READING = (
    Reading("squad", SQUAD, squad_question),
    Reading("nq", NQ, nq_question),
    # Many answers are numbers of one digit, which longer ones contain.
    Reading("drop", DROP, drop_question, whole_words=True),
)
