"""Key-value text in pretraining and in the recovery benchmark: the form of the task `phone_book`, with other names."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ByT5Tokenizer

from statex.evals.mqar_rows import IGNORE
from statex.evals.tasks.retrieval import NAMES, PHONE_BOOK, list_stem

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="examples and benchmarks are not beside the tests")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.fixture
def source() -> Any:
    from key_value_rows import KeyValueRows

    return KeyValueRows(8, CPU, digits=4)


def drawn(source: Any, entries: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    ids: Tensor
    labels: Tensor
    ids, labels = source.draw(entries, rows, torch.Generator().manual_seed(0))
    return ids, labels


def text_of(ids: Tensor) -> str:
    return bytes(int(i) - 3 for i in ids if i >= 3).decode()


def oracle(ids: Tensor) -> Tensor:
    """Logits that are sure of the byte that follows."""
    return torch.nn.functional.one_hot(ids.roll(-1, 1), 264).float()


@pytest.mark.parametrize("entries", [1, 3, 8])
def test_a_row_is_the_tasks_own_text_with_every_entry_asked_once(source: Any, entries: int) -> None:
    context: Any = SimpleNamespace(tokenizer=ByT5Tokenizer(extra_ids=0))
    for row in drawn(source, entries)[0]:
        told, asked = text_of(row).removeprefix(PHONE_BOOK.opening).split(PHONE_BOOK.closing)
        items = [(key, value) for key, value in (line.split(": ") for line in told.splitlines())]
        again = asked.splitlines()
        assert sorted(again) == sorted(told.splitlines())
        assert len({key for key, _ in items}) == entries
        stem = list_stem(context, PHONE_BOOK, items)
        assert stem.ids.tolist() == row[: len(stem.ids)].tolist()
        key, value = again[0].split(": ")
        question = PHONE_BOOK.question(key) + value + PHONE_BOOK.end
        assert text_of(row)[len(stem.ids) :].startswith(question)


def test_numbers_asked_for_alone_count_each_to_its_lines_end(source: Any) -> None:
    for row, answers in zip(*drawn(source, 6), strict=True):
        asked = text_of(row).split(PHONE_BOOK.closing)[1].splitlines()
        assert text_of(answers) == "".join(f"{line.split(': ')[1]}\n" for line in asked)
        counted = answers != IGNORE
        assert torch.equal(answers[counted], row[counted])


def test_no_name_is_one_that_the_task_draws(source: Any) -> None:
    names = {text_of(question).removesuffix(": ") for question in source.questions}
    assert len(names) == len(source.questions)
    assert not names & set(NAMES)


def test_widths_and_numbers_of_entries_are_those_of_the_rows(source: Any) -> None:
    from key_value_rows import ENTRIES

    assert source.counts == [n for n in ENTRIES if n <= 8]
    for entries in source.counts:
        ids, labels = drawn(source, entries)
        assert ids.shape == labels.shape == (3, source.width(entries))


def test_an_oracle_tells_all_numbers_and_one_wrong_digit_spoils_one(source: Any) -> None:
    ids, labels = drawn(source, 4)
    assert source.score(oracle, ids, labels).all()
    last = int((labels[0] != IGNORE).nonzero()[-2])

    def misses_the_last_digit(ids: Tensor) -> Tensor:
        logits = oracle(ids)
        logits[:, last - 1] = 0
        return logits

    hits = source.score(misses_the_last_digit, ids, labels)
    assert hits.shape == (3, 4, 5)
    assert (~hits).nonzero().tolist() == [[row, 3, 3] for row in range(3)]


def test_no_preset_has_rows_of_its_own() -> None:
    from pretrain_tiny import PRESETS

    assert {preset.key_value_tokens for preset in PRESETS.values()} == {0}


def test_rows_grow_with_the_steps_as_pairs_do() -> None:
    from pretrain_tiny import PAIRS, reach

    counts = list(PAIRS)
    assert reach(counts, 0, 100) == counts[:3]
    assert reach(counts, 15, 100) == counts[:6]
    assert reach(counts, 30, 100) == counts


def test_key_values_are_measured_by_number_of_entries_with_their_capacities(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import recovery_measures

    def only_small_books(model: Any, ids: Tensor) -> Tensor:
        told = [text_of(row).split(PHONE_BOOK.closing)[0].count(": ") for row in ids]
        return oracle(ids) * torch.tensor([n <= 4 for n in told])[:, None, None]

    monkeypatch.setattr(recovery_measures, "logits", only_small_books)
    mixture: Any = SimpleNamespace(key_value_rows=source, generator=torch.Generator().manual_seed(0))
    stub: Any = None
    found = {metric: value for _, metric, value in recovery_measures.look_up(stub, mixture, 5)}
    assert [found[f"exact_{n}"] for n in source.counts] == [float(n <= 4) for n in source.counts]
    assert found["first_4"] == found["digits_4"] == 1 > found["digits_6"]
    assert 4 <= found["capacity_90"] <= found["capacity_50"] <= 6
    monkeypatch.setattr(recovery_measures, "logits", lambda model, ids: oracle(ids))
    assert math.isinf({m: v for _, m, v in recovery_measures.look_up(stub, mixture, 5)}["capacity_50"])
    monkeypatch.setattr(recovery_measures, "logits", lambda model, ids: 0 * oracle(ids))
    assert {m: v for _, m, v in recovery_measures.look_up(stub, mixture, 5)}["capacity_50"] == 0


def test_the_first_number_asked_for_is_told_apart_from_those_that_remain(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import recovery_measures

    def tells_the_last_alone(model: Any, ids: Tensor) -> Tensor:
        logits = oracle(ids)
        logits[:, : -source.asked - 6] = 0
        return logits

    monkeypatch.setattr(recovery_measures, "logits", tells_the_last_alone)
    mixture: Any = SimpleNamespace(key_value_rows=source, generator=torch.Generator().manual_seed(0))
    stub: Any = None
    found = {metric: value for _, metric, value in recovery_measures.look_up(stub, mixture, 5)}
    assert (found["exact_1"], found["first_1"]) == (1, 1)
    assert (found["exact_4"], found["first_4"]) == (0.25, 0)


def test_a_run_reads_them_behind_what_it_reads_anyway_and_is_measured_on_them(tmp_path: Path) -> None:
    from recovery import ASSETS, DRY, random_bases
    from recovery_measures import KEY_VALUE
    from recovery_runs import Place, Run, Spec

    bases = random_bases(tmp_path)
    place = Place(CPU, tmp_path, bases, ASSETS / "books_train.jsonl.gz", ASSETS / "books_test.jsonl.gz", **DRY)

    def run(tokens: int) -> Any:
        place.key_value_tokens = tokens
        made = Run(place, Spec("gla-quickstart", "lpt@1e-3", 0, 2, 1.0))
        for _ in made.prepare():
            pass
        return made

    without, with_them = run(0), run(300)
    few, many = without.batches(4), with_them.batches(4, 2)
    assert all(torch.equal(ids, others) for (ids, _), (others, _) in zip(few, many, strict=False))
    width = with_them.data.key_value_rows.width(2)
    assert [ids.shape for ids, _ in many[len(few) :]] == [(300 // width, width)]
    assert without.step(0) < with_them.step(0) <= without.step(1) + 300
    told = [(metric, value) for task, metric, value in with_them.measure(last=False) if task == KEY_VALUE]
    counts = with_them.data.key_value_rows.counts
    shares = [f"{kind}_{n}" for n in counts for kind in ("exact", "first", "digits")]
    assert [metric for metric, _ in told] == [*shares, "capacity_50", "capacity_90"]
    assert not np.isnan([value for _, value in told]).any()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--digits", "0"], "--digits is at least 1"),
        (["--max-entries", "0"], "--max-entries is at least 1"),
        (["--key-value-tokens", "-5"], "--key-value-tokens is at least 0"),
        (["--data", "missing.jsonl.gz"], "missing.jsonl.gz does not exist"),
        ([], "is no checkpoint"),
    ],
)
def test_pretraining_refuses_before_it_trains(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pretrain_tiny

    (tmp_path / "checkpoint").mkdir()
    arguments = ["pretrain_tiny.py", "--preset", "gla", "--data", __file__, "--test", __file__, "--out", str(tmp_path), *options]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(pretrain_tiny, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit):
        pretrain_tiny.main()
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--digits", "0"], ["--key-value-tokens", "-1"]])
def test_recovery_refuses_key_value_text_that_cannot_be(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import recovery

    monkeypatch.setattr("sys.argv", ["recovery.py", "screen", *options])
    with pytest.raises(SystemExit):
        recovery.parse()
    assert "--digits at least 1" in capsys.readouterr().err
