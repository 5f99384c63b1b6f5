"""Values with 95 % intervals, in closed form: Wilson for proportions, a normal interval for ratios, tests for paired differences.

Samples are *rows* (one prompt, one MQAR row, one text window), each with an outcome (correct answers, bits) and a weight
(questions, bytes); the value is Σ outcome / Σ weight. Answers of one row are not independent, so proportions are corrected by
Kish's design effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Second minus first over the same rows, with a 95 % interval and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float

    @property
    def shown(self) -> bool:
        """Whether the data show a difference at the 5 % level (no correction for the number of comparisons)."""
        return self.p < 0.05


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
    """Σ outcome / Σ weight over rows `[R]` (bits per byte: bits and bytes of a window) with a normal interval (delta method)."""
    top, bottom = np.asarray(outcomes, dtype=float), np.asarray(weights, dtype=float)
    value, half = float(top.sum() / bottom.sum()), Z95 * _ratio_error(top, bottom)
    return Estimate(value, value - half, value + half, float(len(top)))


def paired_difference(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> Difference:
    """How much `second` exceeds `first` over the same rows `[R]`.

    The interval is the normal one of the paired ratio. So is the p-value, except where it would be too bold: with single right or
    wrong answers (then this is McNemar's exact test) and with fewer than 30 rows it is that of an exact sign test over rows.
    """
    gain = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    asked = np.asarray(weights, dtype=float)
    value, error = float(gain.sum() / asked.sum()), _ratio_error(gain, asked)
    if (asked == 1).all() or len(gain) < 30:
        p = _sign_test(int((gain > 0).sum()), int((gain < 0).sum()))
    elif error > 0:
        p = math.erfc(abs(value) / error / math.sqrt(2))
    else:
        p = 1.0 if value == 0 else 0.0
    return Difference(value, value - Z95 * error, value + Z95 * error, p)


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
