from __future__ import annotations

import numpy as np
import pytest

from statex.evals.statistics import SIGN, STUDENT, holm, paired_difference, proportion, ratio, t95, t_inside, wilson


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


def test_the_interval_of_a_paired_difference_of_proportions_is_newcombes() -> None:
    """The worked example of Newcombe (1998): 36 pairs right in both, 12 in the first only, 2 in the second only."""
    first, second = [1] * 36 + [0] * 2 + [1] * 12, [1] * 36 + [1] * 2 + [0] * 12
    difference = paired_difference(second, first, [1] * 50, proportions=True)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    assert difference.test == SIGN


def test_all_against_nothing_has_an_interval_that_is_not_a_point() -> None:
    difference = paired_difference([0] * 6, [8] * 6, [8] * 6, proportions=True)
    assert difference.value == difference.high == 1
    assert 0.8 < difference.low < 0.99


@pytest.mark.parametrize("rows", [12, 25, 60])
def test_paired_tests_find_a_difference_that_is_not_there_in_five_percent_at_most(rows: int) -> None:
    rng, found, covered = np.random.default_rng(rows), 0, 0
    for _ in range(200):
        skill = rng.beta(3, 2, rows)
        first, second = rng.binomial(8, skill), rng.binomial(8, skill)
        difference = paired_difference(first, second, [8] * rows, proportions=True)
        found += difference.shown
        covered += difference.low <= 0 <= difference.high
    assert found / 200 <= 0.09
    assert 0.9 <= covered / 200 <= 0.99


def test_few_rows_are_tested_by_flipping_signs_and_many_by_student() -> None:
    gains = np.array([3.0, 1, 2, 4, 2, 1, 3, 2])
    few = paired_difference(np.zeros(8), gains, np.full(8, 10))
    assert few.p == pytest.approx(2 / 2**8)
    many = paired_difference(np.zeros(40), np.tile(gains, 5), np.full(40, 10))
    assert many.test == STUDENT
    seventeen = paired_difference(np.zeros(17), np.arange(2.0, 19), np.full(17, 20))
    assert 0 < seventeen.p < 0.001


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t95(freedom) == pytest.approx(quantile, abs=5e-5)
    assert t_inside(quantile, freedom) == pytest.approx(0.95, abs=1e-5)
    assert t95(0) == np.inf


def test_holms_correction_is_that_of_the_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_many_comparisons_of_equal_checkpoints_rarely_show_any_difference() -> None:
    rng, families = np.random.default_rng(7), 0
    for _ in range(200):
        p = [paired_difference(*rng.binomial(1, 0.5, (2, 40)), np.ones(40)).p for _ in range(10)]
        families += min(holm(p)) < 0.05
    assert families / 200 <= 0.08
