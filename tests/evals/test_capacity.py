"""Capacity curves against recall that is drawn from a known one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from statex.evals.capacity import LEVELS, capacity_curves, capacity_ratios, state_and_capacity
from statex.evals.report import capacity_text
from statex.evals.result import ACCURACY, EvalResult, TaskResult, make_cell

ITEMS = (4, 8, 16, 32, 64, 128)
CHANCE = 1 / 128


def recall(items: float, scale: float, slope: float, lapse: float) -> float:
    return CHANCE + (1 - lapse - CHANCE) / (1 + (items / scale) ** slope)


def task(
    scale: float,
    *,
    slope: float = 2.5,
    lapse: float = 0.0,
    seed: int = 0,
    rows: int = 24,
    items: tuple[int, ...] = ITEMS,
    lengths: tuple[int, ...] = (),
    spread: float = 60,
) -> TaskResult:
    """Rows whose recall scatters around the curve, as rows of a model do."""
    rng, cells = np.random.default_rng(seed), []
    for n in items:
        for length in lengths or (None,):
            at = {"num_pairs": n} | ({} if length is None else {"length": length})
            r = recall(n, scale if length is None else scale * length, slope, lapse)
            right = rng.binomial(n, rng.beta(spread * r, spread * (1 - r), rows))
            cells.append(make_cell(ACCURACY, at, right, np.full(rows, n), f"{n}-{length}"))
    axes = {"num_pairs": "key-value pairs"} | ({"length": "row (tokens)"} if lengths else {})
    return TaskResult("mqar", ACCURACY, axes, cells, CHANCE)


def truth(level: float, scale: float, slope: float, lapse: float) -> float:
    return scale * ((1 - lapse - CHANCE) / (level - CHANCE) - 1) ** (1 / slope)


def test_the_capacities_of_exact_recall_are_found_to_one_percent() -> None:
    for lapse in (0.0, 0.04):
        cells = [
            make_cell(ACCURACY, {"num_pairs": n}, np.full(4, 1e6 * recall(n, 40, 2.2, lapse)), np.full(4, 1_000_000), "x")
            for n in ITEMS
        ]
        (curve,) = capacity_curves(TaskResult("mqar", ACCURACY, {"num_pairs": "pairs"}, cells, CHANCE), resamples=50)
        for level in LEVELS:
            assert curve.capacity(level).value == pytest.approx(truth(level, 40, 2.2, lapse), rel=0.01)
        assert curve.misfit < 0.005


def test_intervals_hold_the_true_capacity_in_about_95_percent() -> None:
    hits = 0
    for seed in range(30):
        (curve,) = capacity_curves(task(45, lapse=0.02, seed=seed), resamples=100)
        for level in LEVELS:
            found = curve.capacity(level)
            hits += (found.low or 0) <= truth(level, 45, 2.5, 0.02) <= (found.high or math.inf)
    assert 0.85 <= hits / 60 <= 1


def test_more_rows_give_a_narrower_interval() -> None:
    widths = []
    for rows in (8, 128):
        found = capacity_curves(task(45, rows=rows), resamples=200)[0].capacity(0.5)
        assert found.low is not None
        assert found.high is not None
        widths.append(math.log(found.high / found.low))
    assert widths[1] < 0.5 * widths[0]


@pytest.mark.parametrize(("scale", "beyond", "text"), [(2000, "above", "> 128"), (1, "below", "< 4")])
def test_a_capacity_beyond_what_was_asked_is_not_extrapolated(scale: float, beyond: str, text: str) -> None:
    (curve,) = capacity_curves(task(scale), resamples=50)
    found = curve.capacity(0.5)
    assert (found.value, found.beyond) == (None, beyond)
    assert capacity_text(found, curve.items) == text


def test_a_model_that_never_reaches_90_percent_has_no_capacity_there() -> None:
    (curve,) = capacity_curves(task(40, lapse=0.25, rows=64), resamples=100)
    assert curve.capacity(0.9).beyond == "below"
    assert curve.capacity(0.5).value == pytest.approx(truth(0.5, 40, 2.5, 0.25), rel=0.1)


def test_recall_that_no_such_curve_describes_is_told_by_its_misfit() -> None:
    values = (1.0, 0.2, 1.0, 0.2, 1.0)
    cells = [
        make_cell(ACCURACY, {"num_pairs": n}, np.full(20, 100 * value), np.full(20, 100), "x")
        for n, value in zip((4, 8, 16, 32, 64), values, strict=True)
    ]
    (curve,) = capacity_curves(TaskResult("mqar", ACCURACY, {"num_pairs": "pairs"}, cells, CHANCE), resamples=20)
    assert curve.misfit > 0.2


def test_each_length_has_a_curve_of_its_own_and_too_few_points_have_none() -> None:
    curves = capacity_curves(task(20, lengths=(1, 2)), resamples=50)
    assert [curve.at for curve in curves] == [{"length": 1}, {"length": 2}]
    ratio = (curves[1].capacity(0.5).value or 0) / (curves[0].capacity(0.5).value or 1)
    assert ratio == pytest.approx(2, rel=0.15)
    assert not capacity_curves(task(20, items=(4, 8)), resamples=20)
    other = TaskResult("niah", ACCURACY, {"length": "tokens"}, task(20).cells, None)
    assert not capacity_curves(other)


def test_ratios_of_capacities_are_paired_and_need_the_same_rows() -> None:
    first, second = task(20, seed=1), task(60, seed=2)
    found = {ratio.level: ratio for _, ratio in capacity_ratios(first, second, resamples=200)}
    assert found[0.5].value == pytest.approx(3, rel=0.1)
    assert found[0.5].low is not None
    assert found[0.5].high is not None
    assert found[0.5].low < 3 < found[0.5].high
    assert [ratio.value for _, ratio in capacity_ratios(first, first, resamples=20)] == [1, 1]
    assert not capacity_ratios(first, task(60, items=(4, 8, 16, 32)))
    above = [ratio.level for _, ratio in capacity_ratios(first, task(5000), resamples=20)]
    assert above == []


def test_a_paired_ratio_is_surer_than_separate_intervals() -> None:
    rng, cells = np.random.default_rng(3), {"first": [], "second": []}
    for n in ITEMS:
        hardness = rng.normal(0, 0.6, 24)
        for name, scale in (("first", 40), ("second", 46)):
            right = np.round(n * np.clip([recall(n * 2**h, scale, 2.5, 0) for h in hardness], 0, 1))
            cells[name].append(make_cell(ACCURACY, {"num_pairs": n}, right, np.full(24, n), str(n)))
    tasks = {name: TaskResult("mqar", ACCURACY, {"num_pairs": "pairs"}, each, CHANCE) for name, each in cells.items()}
    separate = [capacity_curves(each, 300)[0].capacity(0.5) for each in tasks.values()]
    assert separate[0].high is not None
    assert separate[1].low is not None
    assert separate[1].low < separate[0].high
    (ratio, *_) = (ratio for _, ratio in capacity_ratios(tasks["first"], tasks["second"], 300))
    assert ratio.low is not None
    assert ratio.low > 1


def test_capacity_is_listed_by_state_size() -> None:
    def result(name: str, scale: float, state: int | None) -> tuple[str, EvalResult]:
        checkpoint = {"name": name} | ({} if state is None else {"state_elements": state})
        return name, EvalResult(checkpoint, {"mqar": task(scale)}, {}, {}, {}, "now")

    found = state_and_capacity([result("small", 20, 100), result("large", 80, 400), result("attention", 80, None)], "mqar", 0.5)
    assert [(name, state) for name, state, *_ in found] == [("small", 100), ("large", 400)]
    values = [capacity.value for *_, capacity in found]
    assert values[0] is not None
    assert values[1] is not None
    assert values[1] > 3 * values[0]
