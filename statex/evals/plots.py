"""Figures of results: heat maps, lines with intervals, capacity curves. Readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .capacity import Capacity, CapacityCurve, state_and_capacity
from .report import number, score
from .result import ACCURACY, EvalResult, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, told apart by the colour-blind; markers and line styles differ as well."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
HEAT = "cividis"
"""Grows in lightness from end to end, so that it reads the same in grey; every cell also states its value."""

Series = Sequence[tuple[str, TaskResult]]
Point = tuple[float, float, float, float]
"""x, value, low, high of a line."""


def task_figures(series: Series) -> dict[str, Figure]:
    """Figures of one task by file name: lines of all checkpoints, a heat map each where there are two axes, capacity curves.

    A task with a single cell has none.
    """
    name, task = series[0][1].name, series[0][1]
    figures: dict[str, Figure] = {}
    if max(len(each.cells) for _, each in series) < 2:
        return figures
    if len(task.axes) == 1 or len(series) > 1:
        figures[name] = line_plot(series)
    if len(task.axes) > 1 and task.metric == ACCURACY:
        for index, (checkpoint, each) in enumerate(series):
            figures[name if len(series) == 1 else f"{name}_{index + 1}"] = heat_map(each, checkpoint)
    if name not in figures:
        figures[name] = line_plot(series)
    curves = [(checkpoint, curve) for checkpoint, each in series for curve in each.curves]
    if curves:
        figures[f"{name}_capacity"] = capacity_plot(curves, task)
    return figures


def heat_map(task: TaskResult, name: str) -> Figure:
    """Accuracy by the first two axes, each value written into its cell; further axes are pooled."""
    x, y = list(task.axes)[:2]
    columns, rows = task.values(x), task.values(y)
    grid = np.full((len(rows), len(columns)), np.nan)
    for at in {(cell.at[x], cell.at[y]) for cell in task.cells}:
        grid[rows.index(at[1]), columns.index(at[0])] = task.pooled(**{x: at[0], y: at[1]}).value
    figure, axes = new_figure(width=max(4.4, 2.6 + 0.75 * len(columns)), height=1.7 + 0.42 * len(rows))
    draw_heat(axes, grid, [score(task, value) for value in grid.ravel()], label=task.metric)
    axes.set_xticks(range(len(columns)), [number(value) for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:.0%}" if y == "depth" else number(value) for value in rows])
    axes.set_xlabel(task.axes[x])
    axes.set_ylabel(task.axes[y])
    prompts = "/".join(str(n) for n in sorted({cell.rows for cell in task.cells}))
    axes.set_title(f"{task.name} · {name}\n{prompts} prompts a cell", fontsize=10)
    return figure


def draw_heat(axes: Axes, grid: np.ndarray, texts: Sequence[str], *, label: str, low: float = 0, high: float = 1) -> None:
    """A heat map of `grid` `[rows, columns]` with a text in each cell that holds a number, dark on light and light on dark."""
    image = axes.imshow(grid, cmap=HEAT, vmin=low, vmax=high, aspect="auto")
    for ((row, column), value), text in zip(np.ndenumerate(grid), texts, strict=True):
        if np.isfinite(value):
            light = (value - low) / (high - low) > 0.55
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="black" if light else "white")
    axes.figure.colorbar(image, ax=axes, label=label)


def line_plot(series: Series) -> Figure:
    """The metric along a task's first axis with 95 % intervals, one line a checkpoint; other axes are pooled."""
    task = series[0][1]
    axis = next(iter(task.axes))
    figure, axes = new_figure(width=6.2, height=3.9)
    ticks = sorted({x for _, each in series for x in each.values(axis)})
    for index, (name, each) in enumerate(series):
        draw_line(axes, name, _points(each, axis), index, len(series))
    _mark_chance(axes, task)
    _log_ticks(axes, ticks)
    if task.metric == ACCURACY:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(task.axes[axis])
    axes.set_ylabel(task.metric)
    pooled = f", all values of {' and '.join(list(task.axes)[1:])} pooled" if len(task.axes) > 1 else ""
    axes.set_title(f"{task.name}{f' · {series[0][0]}' if len(series) == 1 else ''} (95 % intervals{pooled})", fontsize=10)
    _finish(axes, legend=len(series) > 1)
    return figure


def capacity_plot(curves: Sequence[tuple[str, CapacityCurve]], task: TaskResult) -> Figure:
    """Measured recall with its intervals, the fitted curves, and where they pass 50 % and 90 %."""
    figure, axes = new_figure(width=6.2, height=4.1)
    for index, (name, curve) in enumerate(curves):
        points = list(zip(curve.items, curve.recall, curve.low, curve.high, strict=True))
        colour = COLOURS[index % len(COLOURS)]
        draw_line(axes, _curve_name(name, curve, curves), points, index, len(curves), joined=False)
        grid = np.geomspace(curve.items[0], curve.items[-1], 200)
        axes.plot(grid, curve(grid), color=colour, linestyle=STYLES[index % len(STYLES)], linewidth=1.6)
        for found in curve.capacities:
            if found.value is not None:
                axes.vlines(found.value, -0.03, found.level, color=colour, linewidth=0.8, linestyle=(0, (2, 2)))
    for level in sorted({found.level for _, curve in curves for found in curve.capacities}):
        axes.axhline(level, color="0.55", linewidth=0.8)
        beside_axis(axes, f"{level:.0%}", level)
    _mark_chance(axes, task)
    _log_ticks(axes, sorted({x for _, curve in curves for x in curve.items}))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(task.axes[curves[0][1].axis])
    axes.set_ylabel("recall")
    axes.set_title(f"{task.name}: capacity (measured values with 95 % intervals, fitted curves)", fontsize=10)
    _finish(axes, legend=len(curves) > 1)
    return figure


def state_plot(results: Sequence[tuple[str, EvalResult]], task: str) -> Figure | None:
    """Capacity by state size, the figure that expansion is about; None with fewer than two checkpoints that have both."""
    levels = [(level, state_and_capacity(results, task, level)) for level in (0.5, 0.9)]
    points = [(level, found) for level, found in levels if any(capacity.value is not None for *_, capacity in found)]
    if len({name for _, found in points for name, *_ in found}) < 2:
        return None
    figure, axes = new_figure(width=6.2, height=4.1)
    for index, (level, found) in enumerate(points):
        known = [(state, capacity) for _, state, _, capacity in found if capacity.value is not None]
        draw_line(
            axes,
            f"recall {level:.0%}",
            [_capacity_point(*each) for each in sorted(known, key=lambda each: each[0])],
            index,
            1,
            joined=False,
        )
        for name, state, at, capacity in found:
            if capacity.value is not None:
                text = name + "".join(f", {axis} {number(value)}" for axis, value in at.items())
                axes.annotate(text, (state, capacity.value), xytext=(9, -3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.margins(x=0.18, y=0.15)
    for each in (axes.xaxis, axes.yaxis):
        each.set_major_formatter(lambda value, position: f"{value:,.4g}")
    axes.set_xlabel("recurrent state of one sequence (elements)")
    axes.set_ylabel("items held")
    axes.set_title(f"{task}: items held by state size (95 % intervals)", fontsize=10)
    _finish(axes, legend=True)
    return figure


def draw_line(axes: Axes, name: str, points: list[Point], index: int, of: int, *, joined: bool = True) -> None:
    """Points with intervals, joined by a line or not, in the colours of number `index` of `of` lines that lie beside each other."""
    x, value, low, high = (np.array(column) for column in zip(*points, strict=True))
    # Lines are set apart a little along x, so that intervals of equal coordinates do not hide each other.
    shifted = x * 2 ** (0.06 * (index - (of - 1) / 2 if of > 1 else 0))
    axes.errorbar(
        shifted,
        value,
        yerr=(np.maximum(value - low, 0), np.maximum(high - value, 0)),
        label=name,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=STYLES[index % len(STYLES)] if joined else "none",
        linewidth=1.6,
        markersize=5,
        capsize=3,
        elinewidth=1.1,
    )


def beside_axis(axes: Axes, text: str, y: float, *, right: bool = False) -> None:
    """A small text above height `y`, at the left or the right end of the axes."""
    axes.annotate(
        text,
        (1 if right else 0, y),
        xycoords=("axes fraction", "data"),
        xytext=(-4 if right else 4, 3),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=8,
    )


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure in inches that no window system takes part in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _points(task: TaskResult, axis: str) -> list[Point]:
    """Cells of a one-axis task as they are; of a two-axis task the pooled ones."""
    points = []
    for x in task.values(axis):
        cell = task.pooled(**{axis: x})
        points.append((x, cell.value, cell.value if cell.low is None else cell.low, cell.value if cell.high is None else cell.high))
    return points


def _capacity_point(state: int, capacity: Capacity) -> Point:
    assert capacity.value is not None
    low, high = (capacity.value if bound is None else bound for bound in (capacity.low, capacity.high))
    return state, capacity.value, low, high


def _curve_name(name: str, curve: CapacityCurve, curves: Sequence[tuple[str, CapacityCurve]]) -> str:
    at = ", ".join(f"{axis} {number(value)}" for axis, value in curve.at.items())
    if not at:
        return name
    return at if len({checkpoint for checkpoint, _ in curves}) == 1 else f"{name}, {at}"


def _mark_chance(axes: Axes, task: TaskResult) -> None:
    if task.chance:
        axes.axhline(task.chance, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
        beside_axis(axes, "chance", task.chance, right=True)


def _log_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each coordinate; those of 0 or less need a plain one."""
    if ticks[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xlim(ticks[0] / 2**0.4, ticks[-1] * 2**0.4)
    axes.set_xticks(ticks, [number(x) for x in ticks])
    axes.minorticks_off()


def _finish(axes: Axes, *, legend: bool) -> None:
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if legend:
        axes.legend(frameon=False, fontsize=9, handlelength=3.5)
