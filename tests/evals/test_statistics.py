from __future__ import annotations

import numpy as np
import pytest

from statex.evals.statistics import paired_difference, proportion, ratio, wilson


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (7, 10, 0.39677, 0.89220), (81, 263, 0.25529, 0.36621)],
)
def test_wilson_intervals_are_those_of_the_literature(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right / asked, asked) == pytest.approx((low, high), abs=1e-5)


def test_one_question_a_row_gives_the_plain_wilson_interval() -> None:
    outcomes = [1] * 12 + [0] * 28
    estimate = proportion(outcomes, [1] * 40)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.3, 40))
    assert estimate.effective_n == 40


def test_answers_that_stand_and_fall_with_their_row_count_as_one() -> None:
    all_or_nothing = proportion([16] * 20 + [0] * 20, [16] * 40)
    assert all_or_nothing.effective_n == pytest.approx(39, rel=0.01)
    independent = proportion(np.random.default_rng(0).binomial(16, 0.5, 40), [16] * 40)
    assert independent.effective_n > 400


def test_a_single_row_has_no_interval_of_its_variance() -> None:
    estimate = proportion([3], [8])
    assert estimate.effective_n == 1
    assert (estimate.low, estimate.high) == pytest.approx(wilson(3 / 8, 1))
    assert not np.isfinite(ratio([12.0], [8]).high)


def test_intervals_of_clustered_answers_cover_the_truth_in_95_percent() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(600):
        skill = rng.beta(3, 2, size=40)
        estimate = proportion(rng.binomial(16, skill), [16] * 40)
        hits += estimate.low <= 0.6 <= estimate.high
    assert 0.92 <= hits / 600 <= 0.98


def test_intervals_of_ratios_cover_the_truth_in_95_percent() -> None:
    rng, hits = np.random.default_rng(2), 0
    for _ in range(600):
        size = rng.integers(200, 1000, 60)
        estimate = ratio(rng.gamma(4, 0.5, 60) * size, size)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.92 <= hits / 600 <= 0.98


def test_pairing_shows_what_separate_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    size, hardness = np.full(50, 1000), rng.normal(2, 0.3, 50)
    first, second = hardness * size, (hardness - 0.02 + rng.normal(0, 0.01, 50)) * size
    separate_first, separate_second = ratio(first, size), ratio(second, size)
    assert separate_second.high > separate_first.low
    difference = paired_difference(first, second, size)
    assert difference.shown
    assert difference.low <= -0.02 <= difference.high < 0


def test_five_answers_gained_and_none_lost_are_no_proof_and_six_are() -> None:
    first = np.zeros(50)
    for gained, p in ((5, 0.0625), (6, 0.03125)):
        second = (np.arange(50) < gained).astype(float)
        difference = paired_difference(first, second, np.ones(50))
        assert difference.p == pytest.approx(p)
        assert difference.shown == (gained == 6)


def test_equal_outcomes_show_no_difference() -> None:
    rows = np.random.default_rng(4).integers(0, 9, 40)
    difference = paired_difference(rows, rows, np.full(40, 8))
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
