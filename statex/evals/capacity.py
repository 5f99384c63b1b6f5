"""Capacity: how many items a model holds, fitted to recall by the number of stored items.

    recall(n) = chance + (1 - lapse - chance) / (1 + (n / scale)^slope)

a psychometric function in log n (Wichmann and Hill 2001): near the best recall that the model has (1 - lapse, at least one half)
while the state has room, falling to chance beyond. The *capacity at 50 %* is the n at which the curve passes one half; it is told
only inside the range of n that was measured, never extrapolated. Intervals are percentiles of a bootstrap over rows, drawn anew
within each n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .result import ACCURACY, ITEM_AXES, Cell, EvalResult, TaskResult

LEVELS = (0.5, 0.9)
"""Recall at which a capacity is told."""
RESAMPLES = 1000
FEWEST_POINTS = 3
"""A curve of three parameters through fewer points says nothing."""


@dataclass(frozen=True)
class Capacity:
    """The number of items at which recall passes `level`, with its 95 % interval.

    Attributes:
        value: None where the fitted curve does not pass the level between the fewest and the most items measured.
        beyond: then `above` (the model holds more than was asked) or `below` (it misses the level at the fewest items already).
        low, high: bounds; None where the interval reaches beyond what was measured on that side.
    """

    level: float
    value: float | None
    low: float | None
    high: float | None
    beyond: str | None = None


@dataclass(frozen=True)
class CapacityCurve:
    """A fitted curve of one checkpoint on one task.

    Attributes:
        at: coordinates of the task's other axes that the curve belongs to (`{"length": 512}`); empty where there are none.
        items: numbers of items that were measured, ascending. recall, low, high: measured values with their 95 % intervals.
        fitted: the curve at `items`.
        scale, slope, lapse, chance: its parameters.
        capacities: one for each of `LEVELS`.
        misfit: largest distance of the curve from a measured value that lies outside that value's 95 % interval; 0 if none does.
    """

    task: str
    axis: str
    at: dict[str, float]
    items: list[float]
    recall: list[float]
    low: list[float]
    high: list[float]
    fitted: list[float]
    scale: float
    slope: float
    lapse: float
    chance: float
    capacities: list[Capacity]
    misfit: float

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """Fitted recall at any number of items."""
        return _recall(np.log2(items), np.array([math.log2(self.scale), self.slope, self.lapse]), self.chance)

    def capacity(self, level: float) -> Capacity:
        """The capacity at one of `LEVELS`."""
        return next(found for found in self.capacities if found.level == level)


@dataclass(frozen=True)
class CapacityRatio:
    """How many times more items a second checkpoint holds than the first, on the same rows; bounds None where they are not told."""

    level: float
    value: float
    low: float | None
    high: float | None


def capacity_curves(task: TaskResult, resamples: int = RESAMPLES) -> list[CapacityCurve]:
    """A curve for each combination of the task's other axes; none where recall is not measured by number of items.

    A combination with fewer than three numbers of items gives no curve.
    """
    axis = item_axis(task)
    if axis is None:
        return []
    groups = _groups(task, axis)
    return [_curve(task, axis, dict(at), cells, resamples) for at, cells in groups.items() if len(cells) >= FEWEST_POINTS]


def item_axis(task: TaskResult) -> str | None:
    """The axis that counts stored items, if the task has one."""
    return next((axis for axis in task.axes if axis in ITEM_AXES), None) if task.metric == ACCURACY else None


def capacity_ratios(
    first: TaskResult, second: TaskResult, resamples: int = RESAMPLES
) -> list[tuple[dict[str, float], CapacityRatio]]:
    """Ratios of capacities, second over first, from one bootstrap over the rows that both read; none where inputs differ.

    A ratio needs both capacities to lie within what was measured. A bound that resamples put outside of it is None.
    """
    axis = item_axis(first)
    if axis is None or axis != item_axis(second):
        return []
    found, others = [], _groups(second, axis)
    for at, cells in _groups(first, axis).items():
        paired = others.get(at, [])
        if len(cells) < FEWEST_POINTS or [cell.inputs for cell in cells] != [cell.inputs for cell in paired]:
            continue
        chance, items = first.chance or 0.0, np.array([cell.at[axis] for cell in cells])
        draws = [_resampled(task_cells, resamples) for task_cells in (cells, paired)]
        fits = [_fit(items, *counts, chance) for counts in draws]
        for level in LEVELS:
            crossings = [_clipped(_crossing(fit, level, chance), items) for fit in fits]
            log_ratio = _difference(crossings[1], crossings[0])
            if math.isfinite(log_ratio[0]):
                low, high = _percentiles(log_ratio[1:])
                found.append((dict(at), CapacityRatio(level, 2 ** float(log_ratio[0]), _power(low), _power(high))))
    return found


def state_and_capacity(
    results: Sequence[tuple[str, EvalResult]], task: str, level: float
) -> list[tuple[str, int, dict[str, float], Capacity]]:
    """(name, state elements per sequence, other axes, capacity) of every result that knows both."""
    return [
        (name, int(result.checkpoint["state_elements"]), curve.at, curve.capacity(level))
        for name, result in results
        if task in result.tasks and result.checkpoint.get("state_elements")
        for curve in result.tasks[task].curves
    ]


def _groups(task: TaskResult, axis: str) -> dict[tuple[tuple[str, float], ...], list[Cell]]:
    """Cells by their other coordinates, ascending in items."""
    groups: dict[tuple[tuple[str, float], ...], list[Cell]] = {}
    for cell in sorted(task.cells, key=lambda cell: cell.at[axis]):
        groups.setdefault(tuple((name, value) for name, value in cell.at.items() if name != axis), []).append(cell)
    return dict(sorted(groups.items()))


def _curve(task: TaskResult, axis: str, at: dict[str, float], cells: list[Cell], resamples: int) -> CapacityCurve:
    items, chance = np.array([cell.at[axis] for cell in cells]), task.chance or 0.0
    fits = _fit(items, *_resampled(cells, resamples), chance)
    best = fits[0]
    fitted = _recall(np.log2(items), best, chance)
    capacities = []
    for level in LEVELS:
        crossing = _clipped(_crossing(fits, level, chance), items)
        low, high = _percentiles(crossing[1:])
        value = float(crossing[0])
        beyond = None if math.isfinite(value) else "above" if value > 0 else "below"
        capacities.append(Capacity(level, _power(value), _power(low), _power(high), beyond))
    outside = [
        abs(y - cell.value)
        for y, cell in zip(fitted.tolist(), cells, strict=True)
        if cell.low is not None and cell.high is not None and not cell.low <= y <= cell.high
    ]
    scale, slope, lapse = (float(x) for x in best)
    return CapacityCurve(
        task=task.name,
        axis=axis,
        at=at,
        items=items.tolist(),
        recall=[cell.value for cell in cells],
        low=[cell.value if cell.low is None else cell.low for cell in cells],
        high=[cell.value if cell.high is None else cell.high for cell in cells],
        fitted=fitted.tolist(),
        scale=2**scale,
        slope=slope,
        lapse=lapse,
        chance=chance,
        capacities=capacities,
        misfit=max(outside, default=0.0),
    )


def _resampled(cells: Sequence[Cell], resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and questions by number of items, `[1 + resamples, n]`: as measured, then with rows drawn anew.

    Which rows are drawn depends on the position and number of rows only, so two checkpoints that read the same rows stay paired.
    """
    right, asked = np.empty((1 + resamples, len(cells))), np.empty((1 + resamples, len(cells)))
    for column, cell in enumerate(cells):
        drawn = np.random.default_rng([column, cell.rows]).integers(0, cell.rows, (resamples, cell.rows))
        for counts, values in ((right, np.array(cell.outcomes)), (asked, np.array(cell.weights, dtype=float))):
            counts[0, column], counts[1:, column] = values.sum(), values[drawn].sum(1)
    return right, asked


def _recall(log_items: np.ndarray, fit: np.ndarray, chance: float) -> np.ndarray:
    """The curve at log2 items `[n]` for parameters `[..., 3]` (log2 scale, slope, lapse) -> `[..., n]`."""
    scale, slope, lapse = (fit[..., i, None] for i in range(3))
    fall = 1 / (1 + np.exp2(np.clip(slope * (log_items - scale), -60, 60)))
    return np.asarray(chance + (1 - lapse - chance) * fall)


def _fit(items: np.ndarray, right: np.ndarray, asked: np.ndarray, chance: float) -> np.ndarray:
    """Binomial maximum likelihood for each row of counts `[R, n]` -> `[R, 3]`: a coarse grid, then finer ones around its best
    point.

    A search, since the likelihood of all-or-nothing recall has no finite maximum in the slope; it is bounded by the grid.
    """
    log_items = np.log2(items)
    scales = np.arange(log_items[0] - 3, log_items[-1] + 3.01, 0.25)
    slopes, lapses = np.geomspace(0.4, 12, 12), np.concatenate([[0, 0.005], np.geomspace(0.01, 0.5, 8)])
    grid = np.array(list(itertools.product(scales, slopes, lapses)))
    # Among equal likelihoods argmax takes the first: the smallest lapse.
    grid = grid[np.argsort(grid[:, 2], kind="stable")]
    logs = _log_shares(_recall(log_items, grid, chance))
    best = np.concatenate(
        [grid[(r @ logs[0].T + (a - r) @ logs[1].T).argmax(1)] for r, a in zip(_parts(right), _parts(asked), strict=True)]
    )
    steps = np.array([0.125, 0.17, 0.4])
    corners = np.array(list(itertools.product((0, -1, 1), repeat=3)), dtype=float)
    for _ in range(7):
        around = np.repeat(best[:, None], len(corners), axis=1)
        around[..., 0] += corners[:, 0] * steps[0]
        around[..., 1] = np.clip(around[..., 1] * (1 + corners[:, 1] * steps[1]), 0.3, 14)
        around[..., 2] = np.clip(around[..., 2] * (1 + corners[:, 2] * steps[2]), 0, 0.5)
        known, unknown = _log_shares(_recall(log_items, around, chance))
        score = (right[:, None] * known + (asked - right)[:, None] * unknown).sum(-1)
        best = around[np.arange(len(best)), score.argmax(1)]
        steps = steps / 1.6
    return best


def _parts(counts: np.ndarray) -> list[np.ndarray]:
    """Few rows at a time: the coarse grid has thousands of points for each."""
    return np.array_split(counts, max(1, len(counts) // 100))


def _log_shares(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = np.clip(share, 1e-6, 1 - 1e-6)
    return np.log(share), np.log1p(-share)


def _crossing(fits: np.ndarray, level: float, chance: float) -> np.ndarray:
    """log2 of the items at which each curve `[R, 3]` passes a level `[R]`; -inf: never reached, +inf: it never falls so far."""
    if level <= chance:
        return np.full(len(fits), math.inf)
    scale, slope, lapse = fits.T
    share = (level - chance) / (1 - lapse - chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        place = scale + np.log2(1 / share - 1) / slope
    return np.where(share >= 1, -math.inf, place)


def _clipped(crossing: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Crossings outside the measured range become infinite: the curve is not extrapolated."""
    low, high = math.log2(items[0]), math.log2(items[-1])
    return np.where(crossing > high, math.inf, np.where(crossing < low, -math.inf, crossing))


def _difference(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """second - first where infinities are bounds: both infinite alike give no number, which counts as anything."""
    with np.errstate(invalid="ignore"):
        return second - first


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """2.5 % and 97.5 % of values that may be infinite or unknown; an unknown one counts as the worst on either side."""
    low, high = (np.sort(np.where(np.isnan(values), worst, values)) for worst in (-math.inf, math.inf))
    return float(low[int(0.025 * (len(low) - 1))]), float(high[math.ceil(0.975 * (len(high) - 1))])


def _power(exponent: float) -> float | None:
    return 2**exponent if math.isfinite(exponent) else None
