"""Several results side by side: table, figures, CSV, JSON and report, with paired tests where two read the same inputs.

Rows of one kind (the grid points of one task, for one checkpoint) are tested together: their p-values are corrected by Holm's
method, so that a long table does not find differences by its length.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError
from .capacity import CapacityRatio, capacity_ratios
from .listed import listed
from .result import ACCURACY, Cell, EvalResult, TaskResult, load_result, write_text, writing
from .statistics import Difference, holm, paired_difference

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Row:
    """One grid point of one task: a cell for each checkpoint that has it, and its difference from the first checkpoint's.

    Coordinates that `at` leaves out are pooled; a row without any pools all questions of the task. A difference is None for the
    first checkpoint and where the two did not read the same inputs.
    """

    task: str
    at: dict[str, float]
    cells: list[Cell | None]
    differences: list[Difference | None]


@dataclass(frozen=True)
class Comparison:
    """Results of several checkpoints on the tasks that at least two of them share."""

    names: list[str]
    results: list[EvalResult]
    rows: list[Row]
    paths: list[Path] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Names of the compared tasks."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def series(self, task: str) -> list[tuple[str, TaskResult]]:
        """(name, result) of each checkpoint that has the task."""
        return [(name, result.tasks[task]) for name, result in zip(self.names, self.results, strict=True) if task in result.tasks]

    def summary(self, task: str) -> Row | None:
        """The row that pools all questions of a task; there is none for bits per byte, whose windows of any length share text."""
        return next((row for row in self.rows if row.task == task and not row.at), None)

    @cached_property
    def capacity_ratios(self) -> dict[str, dict[str, list[tuple[dict[str, float], CapacityRatio]]]]:
        """By task and by checkpoint but the first: how many times more items it holds (`capacity.py`), where that can be told."""
        found: dict[str, dict[str, list[tuple[dict[str, float], CapacityRatio]]]] = {}
        for task in self.tasks:
            first, *others = (result.tasks.get(task) for result in self.results)
            ratios = [capacity_ratios(first, other) if first and other else [] for other in others]
            found[task] = dict(zip(self.names[1:], ratios, strict=True))
        return found

    def table(self) -> Group:
        """One rich table a task; print it with a rich console."""
        from .report import comparison_table

        return comparison_table(self)

    def save(self, out: str | Path) -> list[Path]:
        """Write `compare.json`, `compare.csv`, `report.html`, `report.md` and figures into folder `out`; returns their paths."""
        from .reports import comparison_document, write_document

        with writing(out) as folder:
            json_file, csv_file = folder / "compare.json", folder / "compare.csv"
            write_text(json_file, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            write_text(csv_file, self._to_csv())
            return [json_file, csv_file, *write_document(comparison_document(self), folder)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [
            {"task": row.task, "at": row.at, "values": [None if cell is None else _summary(cell) for cell in row.cells]}
            | {"differences": [None if gain is None else finite(asdict(gain)) | {"shown": gain.shown} for gain in row.differences]}
            for row in self.rows
        ]
        checkpoints = [{"as": name, **result.checkpoint} for name, result in zip(self.names, self.results, strict=True)]
        ratios = [
            {"task": task, "as": name, "at": at, **asdict(ratio)}
            for task, by_name in self.capacity_ratios.items()
            for name, found in by_name.items()
            for at, ratio in found
        ]
        return {"checkpoints": checkpoints, "rows": rows, "capacity_ratios": ratios}

    def _to_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                "task",
                "metric",
                "at",
                "checkpoint",
                "n",
                "value",
                "low",
                "high",
                "difference",
                "difference_low",
                "difference_high",
                "p",
                "p_adjusted",
                "test",
            ]
        )
        for row in self.rows:
            at = " ".join(f"{axis}={value:g}" for axis, value in row.at.items())
            for name, result, cell, gain in zip(self.names, self.results, row.cells, row.differences, strict=True):
                if cell is not None:
                    values = [cell.n, cell.value, cell.low, cell.high]
                    change = [None] * 6 if gain is None else [gain.value, gain.low, gain.high, gain.p, gain.adjusted, gain.test]
                    writer.writerow([row.task, result.tasks[row.task].metric, at, name, *values, *change])
        return text.getvalue()


def compare(
    results: Sequence[str | Path | EvalResult], out: str | Path | None = None, *, names: Sequence[str] | None = None
) -> Comparison:
    """Put results side by side.

    Args:
        results: `results.json` files, the folders that hold them, or results; differences are from the first.
        out: folder to write JSON, CSV, report and figures to; their paths are then in `.paths`.
        names: what to call the checkpoints, instead of their own names.

    Raises:
        EvaluationError: fewer than two results, no task in common, another number of names than of results, or a result that cannot
            be read.
    """
    results, names = listed(results), listed(names)
    if len(results) < 2:
        raise EvaluationError(
            "a comparison needs two results or more", where="compare", fix="Give the folders of several `statex eval` runs"
        )
    loaded = [each if isinstance(each, EvalResult) else load_result(each) for each in results]
    if names is not None and len(names) != len(loaded):
        raise EvaluationError(
            f"{len(names)} names are given for {len(loaded)} results", where="names", fix="Give one name a result"
        )
    rows = list(_rows(loaded))
    if not rows:
        has = "; ".join(f"{result.name}: {', '.join(result.tasks)}" for result in loaded)
        raise EvaluationError(
            "the results have no grid point of any task in common", where=has, fix="Evaluate them with the same tasks and options"
        )
    comparison = Comparison(_distinct(list(names or (result.name for result in loaded))), loaded, rows)
    if out is not None:
        comparison.paths.extend(comparison.save(out))
    return comparison


def _rows(results: list[EvalResult]) -> Iterator[Row]:
    for name in dict.fromkeys(name for result in results for name in result.tasks):
        tasks = [result.tasks.get(name) for result in results]
        rows = []
        for at in _points([task for task in tasks if task]):
            # A point without its last coordinate stands for all values of it.
            cells = [task.pooled(**at) if task and task.select(**at) else None for task in tasks]
            if sum(cell is not None for cell in cells) >= 2:
                rows.append(Row(name, at, cells, [None, *(_difference(cells[0], cell) for cell in cells[1:])]))
        yield from _corrected(rows)


def _points(tasks: Sequence[TaskResult]) -> Iterator[dict[str, float]]:
    """Every grid point of any of the results, in order. With two axes, a point for all of the second follows each of the first."""
    x, *others = tasks[0].axes
    for value in sorted({x_value for task in tasks for x_value in task.values(x)}):
        for other in others:
            for second in sorted({cell.at[other] for task in tasks for cell in task.select(**{x: value})}):
                yield {x: value, other: second}
        yield {x: value}
    grids = {tuple(sorted(tuple(cell.at.items()) for cell in task.cells)) for task in tasks}
    if tasks[0].metric == ACCURACY and len(grids) == 1 < len(tasks[0].cells):
        yield {}


def _difference(first: Cell | None, second: Cell | None) -> Difference | None:
    if first is None or second is None or first.inputs != second.inputs:
        return None
    return paired_difference(first.outcomes, second.outcomes, first.weights, proportions=first.correct is not None)


def _corrected(rows: list[Row]) -> Iterator[Row]:
    """Rows with p-values corrected for the number of rows of their kind (the same axes), each checkpoint for itself."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(row.at), []).append(row)
    adjusted: dict[tuple[int, int], float] = {}
    for alike in kinds.values():
        for column in range(len(alike[0].cells)):
            tested = [(id(row), gain.p) for row in alike if (gain := row.differences[column]) is not None]
            values = holm([p for _, p in tested]) if len(tested) > 1 else []
            adjusted |= {(row, column): p for (row, _), p in zip(tested, values, strict=False)}
    for row in rows:
        gains = [gain and replace(gain, adjusted=adjusted.get((id(row), column))) for column, gain in enumerate(row.differences)]
        yield replace(row, differences=gains)


def _summary(cell: Cell) -> dict[str, Any]:
    return {"value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n, "rows": cell.rows, **cell.extra}


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """A bound that a single row does not give is infinite; JSON has no word for that but null."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in numbers.items()}


def _distinct(names: list[str]) -> list[str]:
    """Number names that occur more than once."""
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]
