"""Lookup of stored items: UUIDs in a JSON object (arXiv 2307.03172) and numbers in a phone book (arXiv 2402.01032).

All items are drawn at random, so no model has read them before. A list is read once; its questions branch from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EvaluationError
from ..result import ACCURACY, Cell, digest, make_cell
from ..sources import KV_RETRIEVAL
from ..stems import Row, Stem
from ..task import Advance, Context, Job, Schedule
from ..text import encode_exactly, start_ids
from .magic import draw_uuid

if TYPE_CHECKING:
    from ..subject import Subject

QUESTIONS = 8
"""Questions a list at most, at places spread evenly from the first to the last item."""

_FIRST_NAMES = """
Ada Agnes Albert Alice Arthur Beatrice Bernard Clara Conrad Cora Daniel Dora Edgar Edith Elsie Ernest Ethel Felix Flora Frank George
Grace Harold Hazel Helen Henry Hugo Ida Irene Jasper Julia Laura Leo Louis Mabel Martha Maud Miles Nora Oscar Otto Paul Pearl Ralph
Rosa Ruth Silas Stella Theodore Thomas Vera Victor Viola Walter
"""
_LAST_NAMES = """
Abbott Archer Bailey Barlow Bishop Brewer Carver Chandler Chapman Clarke Cooper Dawson Draper Dyer Fisher Fletcher Foster Fowler
Gardner Glover Granger Harper Hobbs Hooper Hunter Keeper Lister Marsh Mason Mercer Miller Nash Palmer Parker Porter Potter Reeve
Sadler Sawyer Shepherd Slater Spencer Sumner Tanner Thatcher Tucker Turner Tyler Wainwright Walker Weaver Webster Wheeler Woodward
"""
NAMES = [f"{first} {last}" for first in _FIRST_NAMES.split() for last in _LAST_NAMES.split()]

Items = list[tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """How a list of items is written: `opening item item ... closing`, then an item again up to its value, which `end` ends."""

    opening: str
    item: str
    closing: str
    end: str

    def question(self, key: str) -> str:
        """What is asked about a key, up to its value."""
        return self.item.split("{value}")[0].format(key=key)


JSON = Layout("JSON data:\n{{\n", '"{key}": "{value}",\n', "}}\n\nOne entry of this object again:\n", '"')
PHONE_BOOK = Layout("Phone book:\n", "{key}: {value}\n", "\nOne entry of this phone book again:\n", "\n")


def draw_uuids(count: int, rng: np.random.Generator) -> Items:
    """Random UUIDs, which never repeat in practice."""
    return [(draw_uuid(rng), draw_uuid(rng)) for _ in range(count)]


def draw_phone_book(count: int, rng: np.random.Generator) -> Items:
    """Distinct names with seven random digits each."""
    names = (NAMES[i] for i in rng.permutation(len(NAMES))[:count])
    return [(name, f"{rng.integers(200, 1000)}-{rng.integers(0, 10_000):04d}") for name in names]


class Lookup:
    """Items of which some are asked for, each by itself."""

    needs_data = False

    def __init__(self, name: str, layout: Layout, draw: Callable[[int, np.random.Generator], Items], most: int = 10**6) -> None:
        self.name, self.layout, self.most = name, layout, most
        self._draw = draw

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` for more items than can be told apart, or a tokenizer that cannot write them."""
        sizes = sorted(set(context.options.num_pairs))
        if sizes[-1] > self.most:
            raise EvaluationError(
                f"{sizes[-1]} entries are asked for, {self.name} has {self.most}", where="num_pairs", fix="Ask for fewer"
            )
        return self._plan(context, {size: partial(self._drawn, context, size) for size in sizes}, "every item is drawn at random")

    def _drawn(self, context: Context, size: int) -> list[Items]:
        return [self._draw(size, context.rng(self.name, size, row)) for row in range(context.options.samples)]

    def _plan(self, context: Context, lists: Mapping[int, Callable[[], list[Items]]], note: str) -> Schedule:
        list_stem(context, self.layout, next(iter(lists.values()))()[0])
        jobs = [
            Job(f"{size} items", context.options.samples * min(size, QUESTIONS), partial(self._run, context, size, draw))
            for size, draw in lists.items()
        ]
        how = f"up to {QUESTIONS} questions a list, from its first to its last item; the whole value must match"
        return Schedule(jobs, {"num_pairs": "stored items"}, ACCURACY, notes=(note, how))

    def _run(self, context: Context, size: int, draw: Callable[[], list[Items]], subject: Subject, advance: Advance) -> list[Cell]:
        stems = [list_stem(context, self.layout, items) for items in draw()]
        scores = subject.score_stems(stems, advance)
        right = np.array([sum(bool(score.correct.all()) for score in row) for row in scores])
        asked = np.array([len(row) for row in scores])
        tokens = float(np.mean([len(stem.ids) for stem in stems]))
        nats = float(np.mean([score.nats.sum() for row in scores for score in row]))
        inputs = digest(stem.whole(row) for stem in stems for row in stem.rows)
        return [make_cell(ACCURACY, {"num_pairs": size}, right, asked, inputs, {"answer_nats": nats, "tokens": tokens})]


def list_stem(context: Context, layout: Layout, items: Items) -> Stem:
    """A list as a stem with a row for each question."""

    def part(text: str) -> np.ndarray:
        return encode_exactly(context.tokenizer, text, "the list")

    # Keys, values and what stands between them are tokenized by themselves, so that they look the same in list and question.
    before, after = layout.item.split("{value}")
    lines = [np.concatenate([part(before.format(key=key)), part(value), part(after)]) for key, value in items]
    ids = np.concatenate([start_ids(context.tokenizer), part(layout.opening.format()), *lines, part(layout.closing.format())])
    rows = []
    for place in np.unique(np.linspace(0, len(items) - 1, QUESTIONS).round().astype(int)):
        key, value = items[place]
        answer = np.concatenate([part(value), part(layout.end)])
        rows.append(Row(len(ids), np.concatenate([part(layout.question(key)), answer]), len(answer)))
    return Stem(ids, tuple(rows))


class PublishedRetrieval(Lookup):
    """The published lists of 75 UUID pairs where the data folder has them, else 75 pairs drawn the same way."""

    size = 75

    def __init__(self) -> None:
        super().__init__("kv_retrieval_75", JSON, draw_uuids)

    def schedule(self, context: Context) -> Schedule:
        """Raises `EvaluationError` for a data file that cannot be read."""
        try:
            KV_RETRIEVAL.find(context.options.data_dir)
        except EvaluationError:
            return self._plan(context, {self.size: partial(self._drawn, context, self.size)}, "drawn, not the published file")
        rows = KV_RETRIEVAL.read(context.options.data_dir)
        return self._plan(context, {self.size: partial(_published, context, rows)}, "the published lists")


def _published(context: Context, rows: list[dict[str, Any]]) -> list[Items]:
    chosen = context.rng("kv_retrieval_75").permutation(len(rows))[: context.options.samples]
    return [[(key, value) for key, value in rows[i]["ordered_kv_records"]] for i in chosen]


LOOKUPS = (
    Lookup("kv_retrieval", JSON, draw_uuids),
    PublishedRetrieval(),
    Lookup("phone_book", PHONE_BOOK, draw_phone_book, most=len(NAMES)),
)
