"""Values with 95 % intervals: Wilson for proportions, Student's t for ratios, and tests for paired differences.

Samples are *rows* (one prompt, one MQAR row, one text window), each with an outcome (correct answers, bits) and a weight
(questions, bytes); the value is Σ outcome / Σ weight. Answers of one row are not independent, so proportions are corrected by
Kish's design effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the number of independent observations that it is worth."""

    value: float
    low: float
    high: float
    effective_n: float


@dataclass(frozen=True)
class Difference:
    """Second minus first over the same rows, with a 95 % interval and a two-sided p-value.

    Attributes:
        test: the paired test that gave `p`, for reports.
        adjusted: `p` after Holm's correction for the number of comparisons (`holm`); None where it is the only one.
    """

    value: float
    low: float
    high: float
    p: float
    test: str = ""
    adjusted: float | None = None

    @property
    def shown(self) -> bool:
        """Whether the data show a difference at the 5 % level, after correction where there is one."""
        return (self.p if self.adjusted is None else self.adjusted) < 0.05


SIGN, FLIPS, STUDENT = "exact sign test (McNemar)", "sign-flip permutation test", "paired t test"
FEW_ROWS = 30
"""Below this many rows a mean is not taken to be normal, and differences are tested by permutation."""


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion `share` seen in `n` independent trials (Wilson 1927)."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # At 0 and 1 the bound is the share itself; rounding must not push it past.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def proportion(outcomes: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Share of correct answers over rows `[R]` with `weights` questions each, and its Wilson interval.

    The interval uses n / design effect: the variance between rows over the one that independent answers would have, at least 1
    (Kish 1965). With one question a row that is plain Wilson.
    """
    correct, asked = np.asarray(outcomes, dtype=float), np.asarray(weights, dtype=float)
    share, n = float(correct.sum() / asked.sum()), float(asked.sum())
    expected = share * (1 - share) / n
    effect = _ratio_error(correct, asked) ** 2 / expected if expected > 0 and len(asked) < n else 1.0
    effective_n = max(n / max(effect, 1.0), 1.0)
    low, high = wilson(share, effective_n)
    return Estimate(share, low, high, effective_n)


def ratio(outcomes: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Σ outcome / Σ weight over rows `[R]` (bits per byte: bits and bytes of a window) with a t interval (delta method)."""
    top, bottom = np.asarray(outcomes, dtype=float), np.asarray(weights, dtype=float)
    value, half = float(top.sum() / bottom.sum()), t95(len(top) - 1) * _ratio_error(top, bottom)
    return Estimate(value, value - half, value + half, float(len(top)))


def paired_difference(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float], *, proportions: bool = False
) -> Difference:
    """How much `second` exceeds `first` over the same rows `[R]`.

    Args:
        proportions: outcomes are counts of right answers out of `weights`, so the interval stays within -1 to 1 and has a width
            even where all rows agree: it is put together from the two Wilson intervals and their correlation (Newcombe 1998, method
            10, without continuity correction; Donner and Zou 2012). Otherwise it is the t interval of the paired ratio.

    The p-value is that of the exact sign test (McNemar's) for single right or wrong answers, of a sign-flip permutation test over
    rows with fewer than 30 rows (exact up to 16 rows that differ, else 20,000 draws of a fixed seed), and of the paired t test
    beyond.
    """
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    asked = np.asarray(weights, dtype=float)
    gain = after - before
    value, error = float(gain.sum() / asked.sum()), _ratio_error(gain, asked)
    if proportions:
        low, high = _difference_of_proportions(before, after, asked)
    else:
        half = t95(len(gain) - 1) * error
        low, high = value - half, value + half
    if set(np.unique(gain)) <= {-1.0, 0.0, 1.0}:
        return Difference(value, low, high, _sign_test(int((gain > 0).sum()), int((gain < 0).sum())), SIGN)
    if len(gain) < FEW_ROWS:
        return Difference(value, low, high, _flip_test(gain[gain != 0]), FLIPS)
    if error > 0:
        return Difference(value, low, high, 1 - t_inside(abs(value) / error, len(gain) - 1), STUDENT)
    return Difference(value, low, high, 1.0 if value == 0 else 0.0, STUDENT)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: taking those below 5 %, any is false with less than 5 % chance."""
    adjusted, reached = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = reached
    return adjusted


def t_inside(t: float, freedom: int) -> float:
    """Probability that Student's t of `freedom` >= 1 degrees lies within -t to t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    term = math.cos(angle) if freedom % 2 else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if freedom % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


@cache
def t95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; infinite without a degree of freedom."""
    if freedom < 1:
        return math.inf
    low, high = 1.9, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < 0.95 else (low, middle)
    return high


def _difference_of_proportions(before: np.ndarray, after: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    first, second = proportion(before.tolist(), asked.tolist()), proportion(after.tolist(), asked.tolist())
    deviations = [x - x.sum() / asked.sum() * asked for x in (before, after)]
    norm = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    correlation = float((deviations[0] * deviations[1]).sum()) / norm if norm > 0 else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x + y * y - 2 * correlation * x * y))

    value = second.value - first.value
    low = value - reach(second.value - second.low, first.high - first.value)
    high = value + reach(second.high - second.value, first.value - first.low)
    return max(-1.0, low), min(1.0, high)


def _ratio_error(top: np.ndarray, bottom: np.ndarray) -> float:
    """Standard error of Σ top / Σ bottom over independent rows; infinite with a single row."""
    rows = len(top)
    if rows < 2:
        return math.inf
    residual = top - top.sum() / bottom.sum() * bottom
    return math.sqrt(rows / (rows - 1) * float((residual**2).sum())) / float(bottom.sum())


def _sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` under a fair coin."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def _flip_test(gains: np.ndarray, draws: int = 20_000) -> float:
    """Two-sided p-value of Σ gains `[R]`, none 0, had every gain been as likely with the other sign."""
    rows = len(gains)
    if rows <= 16:
        signs = 1.0 - 2.0 * (np.arange(2**rows)[:, None] >> np.arange(rows) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (draws, rows))
        signs[0] = 1  # the sum that was seen is one of those possible
    reached = np.abs(signs @ gains) >= abs(gains.sum()) * (1 - 1e-9)
    return float(reached.mean())
