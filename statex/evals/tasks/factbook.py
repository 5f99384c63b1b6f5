"""Extract a field from a country's page of the CIA World Factbook: a free stand-in for SWDE and FDA (arXiv 2402.18668)."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EvaluationError
from ..result import ACCURACY, Cell, digest
from ..sources import FACTBOOK
from ..task import Advance, Context, Job, Schedule
from ..text import encode, start_ids
from .needle import encode_parts
from .reading import Question, answer_cell, answer_tokens

if TYPE_CHECKING:
    from ..subject import Subject

QUESTIONS = 4
"""Questions a page."""
LONGEST_ANSWER = 60
"""Characters of a field that is asked for, at most; every field stands on the page."""


class Factbook:
    """Pages of up to a given length, each read once and asked about several of its fields, in the page's own wording."""

    name = "factbook"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` where the file is missing, or no page has enough short fields within a length."""
        countries = FACTBOOK.read(context.options.data_dir)
        if not all(isinstance(row.get("fields"), dict) and "country" in row for row in countries):
            raise EvaluationError("a line lacks `country` or `fields`", where="factbook.jsonl", fix=FACTBOOK.fix)
        countries = [row for row in countries if is_held_out(row)]
        order = context.rng(self.name).permutation(len(countries))[: context.options.samples]
        jobs = []
        for length in sorted(set(context.options.lengths)):
            pages = [page for i in order if (page := draw_page(context, countries[i], length)) is not None]
            if not pages:
                raise EvaluationError(
                    f"no page of {length} tokens has {QUESTIONS} fields to ask for", where="lengths", fix="Give greater lengths"
                )
            jobs.append(Job(f"{length} tokens", len(pages) * QUESTIONS, partial(_run, context, length, pages)))
        notes = (
            f"{QUESTIONS} fields of up to {LONGEST_ANSWER} characters a page; pages end with the last field that fits the length",
            "an answer counts if it contains the field's text; no examples",
            "countries whose sha256(code) begins with an odd hex digit; the other half is there to train on",
        )
        return Schedule(jobs, {"length": "page and question (tokens, at most)"}, ACCURACY, notes=notes)


Page = tuple[np.ndarray, list[Question]]
"""Token ids of a page, and its questions."""


def is_held_out(country: dict[str, Any]) -> bool:
    """Whether a country is for evaluation: half of them, by the first hex digit of its code's sha256; those without a code, too."""
    code = country.get("code")
    return code is None or int(hashlib.sha256(str(code).encode()).hexdigest()[0], 16) % 2 == 1


def draw_page(context: Context, country: dict[str, Any], length: int) -> Page | None:
    """The beginning of a country's page with questions, all within `length` tokens; None if it has too few fields."""
    fields = {name: " ".join(str(text).split()) for name, text in country["fields"].items()}
    pieces = [np.concatenate([start_ids(context.tokenizer), encode_parts(context, f"{country['country']}\n\n")])]
    closing = encode_parts(context, f"\nFrom the page on {country['country']} above:\n")
    used, told = len(pieces[0]) + len(closing), dict[str, str]()
    for name, text in fields.items():
        line = encode_parts(context, f"{name}:", f" {text}", "\n")
        # A question repeats the line of its field.
        if used + 2 * len(line) > length:
            continue
        pieces.append(line)
        used += len(line)
        told[name] = text
    short = [name for name, text in told.items() if text and len(text) <= LONGEST_ANSWER]
    if len(short) < QUESTIONS:
        return None
    rng = context.rng("factbook", length, sum(country["country"].encode()))
    asked = [short[i] for i in sorted(rng.permutation(len(short))[:QUESTIONS])]
    questions = [Question(f"{name}:", [[told[name]]]) for name in asked]
    return np.concatenate([*pieces, closing]), questions


def _run(context: Context, length: int, pages: list[Page], subject: Subject, advance: Advance) -> list[Cell]:
    told, inputs = [], list[np.ndarray]()
    for page, questions in pages:
        prompts = [encode(context.tokenizer, question.prompt) for question in questions]
        most = answer_tokens(context, questions)
        told.append(subject.generate(prompts, max_new_tokens=most, header=page, advance=advance))
        inputs += [page, *prompts]
    return [answer_cell({"length": length}, told, [questions for _, questions in pages], digest(inputs))]
