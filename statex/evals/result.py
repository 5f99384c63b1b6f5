"""What an evaluation found, as data: JSON in and out. Tables and figures are drawn from it by `report.py` and `reports`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EvaluationError
from .statistics import proportion, ratio

if TYPE_CHECKING:
    from rich.console import Group

    from .capacity import CapacityCurve

SCHEMA_VERSION = 1
RESULT_FILE = "results.json"

ACCURACY = "accuracy"
BITS_PER_BYTE = "bits per byte"
ITEM_AXES = ("num_pairs", "num_items")
"""Axes that count the items which a prompt stores: recall along them gives a capacity curve (capacity.py)."""


@dataclass(frozen=True)
class Cell:
    """One point of a task's grid.

    Attributes:
        at: the point's coordinates by axis name (`{"length": 512, "depth": 0.5}`).
        n: questions asked (accuracy) or bytes predicted (bits per byte).
        rows: independent samples behind them; the length of `outcomes` and `weights`.
        value, low, high: the metric and its 95 % interval; the bounds are None where a single row gives none.
        effective_n: independent observations that the interval counts (statistics.py).
        correct: right answers; None where the metric is no proportion.
        outcomes, weights: per row the numerator (right answers, bits) and the denominator (questions, bytes) of the metric.
        inputs: digest of the token ids that the model read: cells with equal digests may be compared row by row.
        extra: further numbers of the task (`loss`, `perplexity`, `tokens`).
    """

    at: dict[str, float]
    n: int
    rows: int
    value: float
    low: float | None
    high: float | None
    effective_n: float
    correct: int | None
    outcomes: list[float]
    weights: list[int]
    inputs: str
    extra: dict[str, float] = field(default_factory=dict)


def make_cell(
    metric: str,
    at: dict[str, float],
    outcomes: np.ndarray,
    weights: np.ndarray,
    inputs: str,
    extra: dict[str, float] | None = None,
) -> Cell:
    """A cell from its rows: outcomes `[R]` and weights `[R]`; the metric decides the interval."""
    estimate = (proportion if metric == ACCURACY else ratio)(outcomes.tolist(), weights.tolist())
    return Cell(
        at=at,
        n=int(weights.sum()),
        rows=len(weights),
        value=estimate.value,
        low=_finite(estimate.low),
        high=_finite(estimate.high),
        effective_n=round(estimate.effective_n, 2),
        correct=int(outcomes.sum()) if metric == ACCURACY else None,
        outcomes=[round(float(x), 4) for x in outcomes],
        weights=[int(w) for w in weights],
        inputs=inputs,
        extra=extra or {},
    )


@dataclass(frozen=True)
class TaskResult:
    """All cells of one task.

    Attributes:
        axes: axis name -> label with its unit, in order: the x axis first, then (heat maps) the y axis.
        chance: the score of blind guessing, where the task has one.
        notes: what a reader must know (where the text came from, how windows were cut).
    """

    name: str
    metric: str
    axes: dict[str, str]
    cells: list[Cell]
    chance: float | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def higher_is_better(self) -> bool:
        """Accuracy rises, bits per byte fall."""
        return self.metric == ACCURACY

    @cached_property
    def curves(self) -> list[CapacityCurve]:
        """Recall by the number of stored items, fitted (capacity.py); none where the task does not count items."""
        from .capacity import capacity_curves

        return capacity_curves(self)

    def values(self, axis: str) -> list[float]:
        """The grid's coordinates along one axis, ascending."""
        return sorted({cell.at[axis] for cell in self.cells})

    def select(self, **at: float) -> list[Cell]:
        """Cells with these coordinates."""
        return [cell for cell in self.cells if all(cell.at[axis] == value for axis, value in at.items())]

    def pooled(self, **at: float) -> Cell:
        """One cell of all cells with these coordinates (of all, when none is given).

        Cells of equally many rows are added row by row, since their rows share text (a needle at several depths of one haystack);
        others stand one after the other.

        Raises:
            EvaluationError: no such cell.
        """
        cells = self.select(**at)
        if not cells:
            raise EvaluationError(
                "the result has no such cell", where=f"task {self.name} at {at}", fix="Give coordinates of the grid"
            )
        outcomes, weights = [np.array(cell.outcomes) for cell in cells], [np.array(cell.weights) for cell in cells]
        inputs = hashlib.sha256("".join(cell.inputs for cell in cells).encode()).hexdigest()[:16]
        if len({cell.rows for cell in cells}) == 1:
            return make_cell(self.metric, at, np.sum(outcomes, axis=0), np.sum(weights, axis=0), inputs)
        return make_cell(self.metric, at, np.concatenate(outcomes), np.concatenate(weights), inputs)


@dataclass(frozen=True)
class EvalResult:
    """One checkpoint's evaluation.

    Attributes:
        checkpoint: name, path, sha256 by file, parameters, state elements per sequence, plan: what was measured.
        settings: every option of the run.
        versions, machine: what it ran on.
    """

    checkpoint: dict[str, Any]
    tasks: dict[str, TaskResult]
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    created: str
    schema_version: int = SCHEMA_VERSION

    @property
    def name(self) -> str:
        """The checkpoint's name, for legends and column heads."""
        return str(self.checkpoint["name"])

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvalResult:
        """Inverse of `to_dict`. Raises `TypeError` or `KeyError` on unknown or missing fields."""
        tasks = {
            name: TaskResult(**{**task, "cells": [Cell(**cell) for cell in task["cells"]]}) for name, task in data["tasks"].items()
        }
        for cell in (cell for task in tasks.values() for cell in task.cells):
            if not len(cell.outcomes) == len(cell.weights) == cell.rows:
                raise TypeError(f"{len(cell.outcomes)} outcomes, {len(cell.weights)} weights and {cell.rows} rows")
        data["checkpoint"]["name"]
        return cls(**{**data, "tasks": tasks})

    def table(self) -> Group:
        """One rich table a task; print it with a rich console."""
        from .report import result_table

        return result_table(self)

    def save(self, out: str | Path) -> list[Path]:
        """Write `results.json`, figures, `report.html` and `report.md` into folder `out` (made if absent); returns their paths."""
        from .reports import result_document, write_document

        with writing(out) as folder:
            target = folder / RESULT_FILE
            write_text(target, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            return [target, *write_document(result_document(self), folder)]


def load_result(path: str | Path) -> EvalResult:
    """Read a result back from `results.json` or the folder that holds it.

    Raises:
        EvaluationError: no such file, no JSON, or written by another schema.
    """
    target = Path(path)
    if target.is_dir():
        target = target / RESULT_FILE
    try:
        data = json.loads(target.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvaluationError(
            "there is no evaluation result here", where=str(target), fix="Run `statex eval CHECKPOINT -o FOLDER` first"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"the result is not valid JSON ({error})", where=str(target), fix="Run the evaluation again"
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise EvaluationError(
            f"the result has schema version {version}, this statex reads {SCHEMA_VERSION}",
            where=str(target),
            fix="Run the evaluation again with this version, or point at a results.json that `statex eval` wrote",
        )
    try:
        return EvalResult.from_dict(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"the result lacks or misnames a field ({error})", where=str(target), fix="Run the evaluation again"
        ) from error


def check_folder(out: str | Path) -> Path:
    """A folder to write into, which need not exist. Raises `EvaluationError` where no folder can be."""
    folder = Path(out).expanduser()
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = f"{there} is not a folder" if not there.is_dir() else f"{there} cannot be written"
        raise EvaluationError(what, where=str(out), fix="Choose another -o")
    return folder


@contextmanager
def writing(out: str | Path) -> Iterator[Path]:
    """The folder `out`, made if absent; one that was made and could not be filled is removed. Raises `EvaluationError`."""
    folder = check_folder(out)
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        what = f"the results cannot be written: {error.strerror or error}"
        raise EvaluationError(what, where=str(out), fix="Make room, or choose another -o") from error


def digest(rows: Iterable[np.ndarray]) -> str:
    """Short sha256 of token rows: equal for equal inputs."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row.tolist()).encode())
    return found.hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
