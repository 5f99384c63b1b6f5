"""The driver of the state-tracking benchmark: its data are right, its runs share a device, and what is done is not done again."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from statex.evals.tracking_rows import group_table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside the tests")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def bench(results: Path, **sizes: Any) -> Any:
    from state_tracking import Bench
    from tracking_runs import Place

    place = Place(torch.device("cpu"), results.parent / "work", width=32, text_windows=2, words=4)
    return Bench(place, results, "parity", **{"at_once": 2, "layers": 1, "hidden": 16, "batch": 4, "scale": 0.0} | sizes)


@pytest.mark.parametrize(("problem", "group"), [("parity", "Z2"), ("s3_words", "S3"), ("a5_words", "A5")])
def test_words_on_the_device_have_the_products_of_a_loop(problem: str, group: str) -> None:
    from tracking_runs import Words

    words = Words(problem, torch.device("cpu"), seed=0)
    ids, answers = words.draw(3, 37)
    number = {token: index for index, token in enumerate(words.tokens.tolist())}
    for row, told in zip(ids.tolist(), answers.tolist(), strict=True):
        state = 0
        for token, answer in zip(row, told, strict=True):
            state = int(group_table(group)[state, number[token]])
            assert number[answer] == state


def test_runs_take_turns_and_the_next_starts_when_one_ends() -> None:
    from side_by_side import run_side_by_side

    told = []

    def run(name: str, steps: int) -> Generator[None, None, str]:
        for step in range(steps):
            told.append(f"{name}{step}")
            yield
        return name

    runs = [partial(run, "a", 3), partial(run, "b", 1), partial(run, "c", 2)]
    assert list(run_side_by_side(runs, torch.device("cpu"), at_once=2)) == ["b", "a", "c"]
    assert told == ["a0", "b0", "a1", "a2", "c0", "c1"]


def test_what_the_csv_holds_is_not_run_again_and_an_interruption_loses_one_run_at_most(tmp_path: Path) -> None:
    from dataclasses import asdict

    from tracking_runs import OUTCOMES

    bench_, asked = bench(tmp_path / "runs.csv"), []

    def train(place: Any, spec: Any, fails: bool = False) -> Generator[None, None, dict[str, Any]]:
        asked.append(spec.seed)
        yield
        if fails and spec.seed == 2:
            raise KeyboardInterrupt
        return asdict(spec) | dict.fromkeys(OUTCOMES, 0.5)

    specs = [bench_.spec("confirm", "mamba", "[0, 1]", seed, 1e-3) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        bench_.run(specs, partial(train, fails=True))
    kept = {int(line["seed"]) for line in bench_.lines()}
    assert kept == {0, 1}
    asked.clear()
    bench_.run(specs, train)
    assert asked == [2, 3]
    assert [int(line["seed"]) for line in bench_.lines()] == [0, 1, 2, 3]


def test_the_screen_chooses_the_rate_that_reads_furthest(tmp_path: Path) -> None:
    from dataclasses import asdict

    from state_tracking import best_rates
    from tracking_runs import OUTCOMES

    bench_ = bench(tmp_path / "runs.csv")
    outcomes = {1e-3: (0.6, ""), 3e-3: (0.999, "700"), 1e-2: (0.999, "300")}

    def train(place: Any, spec: Any) -> Generator[None, None, dict[str, Any]]:
        yield
        share, solved = outcomes[spec.learning_rate]
        return asdict(spec) | dict.fromkeys(OUTCOMES, "") | {"accuracy_256": share, "solved_at": solved}

    bench_.run([bench_.spec("screen", "mamba", "[-1, 1]", 0, rate) for rate in outcomes], train)
    assert best_rates(bench_) == {("mamba", "[-1, 1]"): 1e-2}


def test_surgery_runs_from_a_text_model_to_a_line_for_each_arm(tmp_path: Path) -> None:
    """`preserve` starts where the text model ended, `inherit` does not."""
    from tracking_runs import fine_tuned, text_base

    bench_ = bench(tmp_path / "runs.csv")
    bench_.run([bench_.spec("base", "delta_net", "[0, 1]", 1, 1e-3)], text_base)
    bench_.run([bench_.spec("surgery", "delta_net", arm, 1, 1e-3) for arm in ("no surgery", "preserve", "inherit")], fine_tuned)
    lines = {line["arm"]: line for line in bench_.lines()}
    base, control, preserve, inherit = (lines[arm] for arm in ("[0, 1]", "no surgery", "preserve", "inherit"))
    assert base["bits_after"] == control["bits_before"] == preserve["bits_before"]
    assert inherit["bits_before"] != base["bits_after"]
    assert all(float(line["bits_after"]) > 0 for line in (control, preserve, inherit))
