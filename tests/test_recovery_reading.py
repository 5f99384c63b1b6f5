"""Rows of real text for the recovery benchmark: what counts, what is right, and that training never sees a test page."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from statex.evals.tasks.factbook import is_held_out

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside the tests")
WIDTH = 400


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from recovery_reading import ReadingRows

    fields = {f"Field {i}": f"value {i} of {i * i}" for i in range(12)} | {"Long": "many words " * 30}
    countries = [{"country": f"Land {i}", "code": f"c{i}", "fields": fields} for i in range(20)]
    paragraph = "The river rises in the hills and runs for 300 km to the sea."
    squad = [{"title": f"River_{i}", "context": paragraph, "question": "How long is it?", "answers": ["300 km"]} for i in range(20)]
    long = {"title": "Long", "context": paragraph * 20, "question": "?", "answers": ["300 km"]}
    for name, lines in (("factbook", countries), ("squad_train", [long, *squad[:10]]), ("squad_dev", squad[10:])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return ReadingRows(tmp_path, WIDTH, torch.device("cpu"), seed=0, train=30, test=10)


def text_of(ids: Tensor) -> str:
    return bytes(int(i) - 3 for i in ids if i >= 3).decode()


def told(rows: Any, logits: Any) -> dict[tuple[str, str], float]:
    return {(task, metric): value for task, metric, value in rows.score(logits)}


def oracle(ids: Tensor) -> Tensor:
    """Logits that are sure of the byte that follows."""
    logits = torch.zeros(*ids.shape, 264)
    logits[:, :-1].scatter_(2, ids[:, 1:, None], 30.0)
    return logits


def test_only_answers_count_and_they_stand_in_the_row_before(rows: Any) -> None:
    for kept in (rows.train, rows.test):
        for ids, labels in zip(*kept["factbook"], strict=True):
            answers = text_of(labels).splitlines()
            assert 2 <= len(answers) <= 8
            page = text_of(ids).split("\nFrom the page on ")[0]
            assert all(f":{answer}" in page for answer in answers)
        for ids, labels in zip(*kept["squad"], strict=True):
            assert text_of(labels) == " 300 km\n"
            assert text_of(ids).endswith("Answer: 300 km\n")
        assert all(bool(((labels == -100) | (labels == ids)).all()) for ids, labels in kept.values())


def test_training_and_test_rows_share_no_page(rows: Any) -> None:
    for kept, held_out in ((rows.train, False), (rows.test, True)):
        codes = {text_of(ids).split("\n")[0].replace("Land ", "c") for ids in kept["factbook"][0]}
        assert codes
        assert all(is_held_out({"code": code}) is held_out for code in codes)
    titles = [{text_of(ids).split("\n")[0] for ids in kept["squad"][0]} for kept in (rows.train, rows.test)]
    assert titles[0].isdisjoint(titles[1])


def test_paragraphs_that_do_not_fit_are_left_out(rows: Any) -> None:
    assert all(not text_of(ids).startswith("Title: Long") for ids in rows.train["squad"][0])


def test_the_generator_alone_decides_what_is_drawn(rows: Any) -> None:
    first, again, other = (rows.keyed(seed).draw(8) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_an_oracle_answers_all_and_one_wrong_byte_spoils_an_answer(rows: Any) -> None:
    best = told(rows, oracle)
    assert best["factbook", "exact"] == best["squad", "exact"] == 1
    assert best["squad", "bits"] == pytest.approx(0, abs=1e-6)

    def forgets_the_last_answer(ids: Tensor) -> Tensor:
        logits = oracle(ids)
        for row, length in zip(logits, (ids > 0).sum(1), strict=True):
            row[length - 2] = 0.0  # the line's end, the last byte of the row
        return logits

    spoilt = told(rows, forgets_the_last_answer)
    counts = [len(text_of(labels).splitlines()) for labels in rows.test["factbook"][1]]
    assert spoilt["squad", "exact"] == 0
    assert spoilt["factbook", "exact"] == pytest.approx(1 - len(counts) / sum(counts))
    ends = np.log2(264) / len(" 300 km\n")
    assert spoilt["squad", "bits"] == pytest.approx(ends, rel=1e-5)
