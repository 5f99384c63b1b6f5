"""Figures: a heat map for a task with two axes, a line with intervals for one. Readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .report import number, score
from .result import ACCURACY, EvalResult, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, told apart by the colour-blind; markers and line styles differ as well."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
DPI = 200

Point = tuple[float, float, float, float]
"""x, value, low, high of a line."""


def save_plots(result: EvalResult, folder: Path) -> list[Path]:
    """One PNG a task, named after it; a task with a single cell has no figure."""
    paths = []
    for task in result.tasks.values():
        if len(task.cells) > 1:
            figure = heat_map(task, result.name) if len(task.axes) == 2 else line_plot([(result.name, task)])
            paths.append(save(figure, folder / f"{task.name}.png"))
    return paths


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def heat_map(task: TaskResult, name: str) -> Figure:
    """Accuracy by x (length) and y (depth), each value written into its cell."""
    x, y = task.axes
    columns, rows = task.values(x), task.values(y)
    grid = np.full((len(rows), len(columns)), np.nan)
    for cell in task.cells:
        grid[rows.index(cell.at[y]), columns.index(cell.at[x])] = cell.value
    figure, axes = _figure(width=max(4.4, 2.6 + 0.75 * len(columns)), height=1.7 + 0.42 * len(rows))
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(
                column, row, score(task, value), ha="center", va="center", fontsize=9, color="black" if value > 0.55 else "white"
            )
    axes.set_xticks(range(len(columns)), [number(value) for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:.0%}" for value in rows])
    axes.set_xlabel(task.axes[x])
    axes.set_ylabel(task.axes[y])
    prompts = "/".join(str(n) for n in sorted({cell.rows for cell in task.cells}))
    axes.set_title(f"{task.name} · {name}\n{prompts} prompts a cell", fontsize=10)
    figure.colorbar(image, ax=axes, label=task.metric)
    return figure


def line_plot(series: Sequence[tuple[str, TaskResult]]) -> Figure:
    """The metric along a task's first axis with 95 % intervals, one line a checkpoint; a second axis is pooled."""
    task = series[0][1]
    axis = next(iter(task.axes))
    figure, axes = _figure(width=6.2, height=3.9)
    ticks = sorted({x for _, each in series for x in each.values(axis)})
    for index, (name, each) in enumerate(series):
        _line(axes, name, _points(each, axis), index, len(series))
    if task.chance:
        axes.axhline(task.chance, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            "chance",
            (1, task.chance),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 2**0.4, ticks[-1] * 2**0.4)
    axes.set_xticks(ticks, [number(x) for x in ticks])
    axes.minorticks_off()
    if task.metric == ACCURACY:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(task.axes[axis])
    axes.set_ylabel(task.metric)
    pooled = f", all values of {list(task.axes)[1]} pooled" if len(task.axes) == 2 else ""
    axes.set_title(f"{task.name}{f' · {series[0][0]}' if len(series) == 1 else ''} (95 % intervals{pooled})", fontsize=10)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9, handlelength=3.5)
    return figure


def _points(task: TaskResult, axis: str) -> list[Point]:
    """Cells of a one-axis task as they are; of a two-axis task the pooled ones."""
    points = []
    for x in task.values(axis):
        cell = task.pooled(**{axis: x})
        points.append((x, cell.value, cell.value if cell.low is None else cell.low, cell.value if cell.high is None else cell.high))
    return points


def _line(axes: Axes, name: str, points: list[Point], index: int, of: int) -> None:
    x, value, low, high = (np.array(column) for column in zip(*points, strict=True))
    # Lines are set apart a little along x, so that intervals of equal coordinates do not hide each other.
    shifted = x * 2 ** (0.06 * (index - (of - 1) / 2))
    axes.errorbar(
        shifted,
        value,
        yerr=(value - low, high - value),
        label=name,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=STYLES[index % len(STYLES)],
        linewidth=1.6,
        markersize=5,
        capsize=3,
        elinewidth=1.1,
    )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure in inches that no window system takes part in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
