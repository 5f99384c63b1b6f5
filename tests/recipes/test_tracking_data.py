"""Words over a state as training documents: whole, labelled with their answers, growing, and the same after a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from statex.errors import RecipeError
from statex.evals.mqar_rows import IGNORE
from statex.evals.tracking_rows import PROBLEMS, group_table, symbol_ids
from statex.recipes import finetune
from statex.recipes.data.packing import Packer
from statex.recipes.data.readers import Shard
from statex.recipes.data.sources import TrackingSource, open_sources
from statex.recipes.schema import TrackingEntry
from tests.recipes.helpers import byte_tokenizer, write_byte_mamba2, write_documents

SEED = (0,)


def source(longest_row: int = 64, shard: Shard | None = None, **fields: Any) -> TrackingSource:
    entry = TrackingEntry(kind="tracking", **{"problems": ["parity"], **fields})
    return TrackingSource(entry, byte_tokenizer(), SEED, shard or Shard(), longest_row)


def drawn(rows: TrackingSource, count: int) -> list[Any]:
    found = [rows.take(1000) for _ in range(count)]
    assert all(fragment is not None for fragment in found)
    return found


@pytest.mark.parametrize(("name", "group"), [("parity", "Z2"), ("a5_words", "A5")])
def test_every_symbol_is_labelled_with_the_product_so_far(name: str, group: str) -> None:
    problem, vocabulary, table = PROBLEMS[name], symbol_ids(byte_tokenizer()).tolist(), group_table(group)
    for fragment in drawn(source(problems=[name]), 20):
        symbols = [vocabulary.index(token) - problem.first for token in fragment.ids]
        assert fragment.labels[0] == IGNORE
        state = 0
        for symbol, label in zip(symbols[:-1], fragment.labels[1:].tolist(), strict=True):
            state = int(table[state, symbol])
            assert vocabulary.index(label) - problem.first == state


def test_words_have_all_lengths_between_the_shortest_and_the_longest() -> None:
    lengths = {len(fragment.ids) - 1 for fragment in drawn(source(shortest=3, longest=9), 200)}
    assert lengths == set(range(3, 10))


def test_words_grow_with_their_number_whatever_the_shard() -> None:
    for shard in (Shard(), Shard(index=1, count=2)):
        lengths = [len(f.ids) - 1 for f in drawn(source(shortest=3, longest=40, growth=400, shard=shard), 400 // shard.count)]
        tenth = len(lengths) // 10
        assert max(lengths[:tenth]) <= 3 + 4
        assert max(lengths[-tenth:]) >= 35


def test_problems_are_drawn_alike_and_expressions_are_asked_at_their_end_only() -> None:
    vocabulary = symbol_ids(byte_tokenizer()).tolist()
    names = list(PROBLEMS)
    counts = dict.fromkeys(names, 0)
    for fragment in drawn(source(problems=names, shortest=10, longest=20), 300):
        first = vocabulary.index(fragment.ids[0])
        name = next(name for name, p in PROBLEMS.items() if p.first <= first < p.first + p.symbols)
        counts[name] += 1
        if name == "modular_arithmetic":
            assert np.flatnonzero(fragment.labels != IGNORE).tolist() == [len(fragment.ids) - 1]
    assert all(30 < count < 90 for count in counts.values()), counts


def test_a_word_that_does_not_fit_waits_and_is_not_split() -> None:
    rows = source(shortest=9, longest=9)
    assert rows.take(9) is None
    assert len(rows.take(10).ids) == 10


def test_words_go_on_exactly_from_any_state() -> None:
    entry = TrackingEntry(kind="tracking", problems=["parity", "s3_words"], longest=15, growth=40)

    def packer() -> Packer:
        return Packer(open_sources([entry], byte_tokenizer(), longest=40, seed=SEED, shard=Shard()), 40, 0)

    rows = packer()
    rows.batch(5)
    state, expected = rows.state(), rows.batch(5)
    again = packer()
    again.load_state(state)
    assert torch.equal(again.batch(5).labels, expected.labels)


def test_words_longer_than_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match="a word of 40 symbols and its answer do not fit into rows of 40 tokens"):
        source(longest_row=40)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problems": ["paritty"]}, "'parity'"),
        ({"problems": []}, "at least 1"),
        ({"shortest": 9, "longest": 8}, "shortest .9. is more than longest .8."),
        ({"problems": ["modular_arithmetic"], "shortest": 1, "longest": 1}, "at least 2 symbols"),
    ],
)
def test_entries_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrackingEntry(kind="tracking", **{"problems": ["parity"], **fields})


def test_the_shipped_recipe_runs_on_a_checkpoint_and_a_text(tmp_path: Path) -> None:
    base = write_byte_mamba2(tmp_path / "base")
    text = write_documents(tmp_path / "text.jsonl", ["a bit of text to read " * 30] * 4)
    small = ["data.sequence_length=48", "training.batch_size=1", "schedule.max_steps=2", "schedule.warmup_steps=0"]
    result = finetune(base, "tracking", [str(text)], tmp_path / "out", overrides=small, device="cpu")
    assert result.steps == 2
    assert "words of parity, up to 40 symbols" in (tmp_path / "out" / "README.md").read_text()
