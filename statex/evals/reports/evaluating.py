"""What one evaluation says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ..capacity import LEVELS, CapacityCurve
from ..report import capacity_text, number, with_interval
from ..result import ACCURACY, EvalResult, TaskResult
from .document import Block, Code, Document, Heading, Notes, Picture, Table

WORDS = frozenset({0, 1})


def result_document(result: EvalResult) -> Document:
    """Summary, each task with figures and tables, the plan that made the checkpoint, provenance."""
    from ..plots import task_figures

    blocks: list[Block] = [Heading("Summary"), summary_table(result)]
    for task in result.tasks.values():
        blocks.append(Heading(task.name))
        for name, figure in task_figures([(result.name, task)]).items():
            blocks.append(Picture(figure, name, f"{task.metric} of {result.name} on {task.name}; the table below has the numbers"))
        blocks += task_blocks(result.name, task)
    blocks += [*plan_blocks(result.name, result.checkpoint), Heading("Provenance"), provenance_table(result)]
    return Document(f"Evaluation of {result.name}", blocks)


def summary_table(result: EvalResult) -> Table:
    """One line a task: all questions pooled, or the longest window's bits per byte."""
    rows = []
    for task in result.tasks.values():
        axis = next(iter(task.axes))
        pooled = task.metric == ACCURACY
        last = task.values(axis)[-1]
        cell = task.pooled() if pooled else task.pooled(**{axis: last})
        measured = " and ".join(f"{number(len(task.values(each)))} × {label}" for each, label in task.axes.items())
        where = f"all of {measured}" if pooled else f"{task.axes[axis]} = {number(last)}"
        rows.append(
            [task.name, where, task.metric, with_interval(task, cell), f"{task.chance:.3g}" if task.chance else "", f"{cell.n:,}"]
        )
    head = ["task", "over", "metric", "value", "chance", "questions or bytes"]
    return Table(head, rows, caption="95 % intervals", words=frozenset({0, 1, 2}))


def task_blocks(name: str, task: TaskResult) -> list[Block]:
    """The task's table, its notes, and its capacities."""
    notes = [*task.notes]
    if task.chance:
        notes.append(f"blind guessing scores about {task.chance:.3g}")
    table = _grid(name, task) if len(task.axes) > 1 and task.metric == ACCURACY else _list(name, task)
    return [table, Notes(notes), *capacity_blocks(task, [(name, curve) for curve in task.curves])]


def capacity_blocks(task: TaskResult, curves: list[tuple[str, CapacityCurve]]) -> list[Block]:
    """How many items each checkpoint holds."""
    if not curves:
        return []
    axes = list(curves[0][1].at)
    head = ["checkpoint", *(task.axes[axis] for axis in axes), *(f"items at {level:.0%} recall" for level in LEVELS), "lapse"]
    rows = [
        [
            name,
            *(number(curve.at[axis]) for axis in axes),
            *(capacity_text(curve.capacity(level), curve.items) for level in LEVELS),
            f"{curve.lapse:.3f}",
        ]
        for name, curve in curves
    ]
    notes = [
        "fitted: recall falls from 1 - lapse to chance along a logistic curve in the logarithm of the number of items; intervals "
        "are from a bootstrap over rows; nothing is extrapolated beyond the numbers of items that were asked"
    ]
    bad = max(curve.misfit for _, curve in curves)
    if bad > 0.02:
        notes.append(
            f"a fitted curve leaves the 95 % interval of a measured value by up to {bad:.2f}: trust the points, not the curve"
        )
    return [Table(head, rows, title=f"{task.name}: capacity", words=frozenset({0})), Notes(notes)]


def plan_blocks(name: str, checkpoint: Mapping[str, Any]) -> list[Block]:
    """The plan that expanded the checkpoint; nothing for one that was not expanded."""
    plan = checkpoint.get("plan")
    if not plan:
        return []
    return [Heading(f"Plan that made {name}"), Code(yaml.safe_dump(plan, sort_keys=False, default_flow_style=None, width=110))]


def provenance_table(result: Any) -> Table:
    """What was measured, with which settings, on what: of an evaluation or a diagnosis."""
    rows = [[key, value] for key, value in _facts(result)]
    return Table(["what", "value"], rows, words=WORDS)


def _facts(result: Any) -> Iterator[tuple[str, str]]:
    checkpoint = result.checkpoint
    for key in ("name", "path", "family", "parameters", "state_elements"):
        value = checkpoint.get(key)
        if value is not None:
            yield key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
    yield "expanded", f"yes, from {checkpoint.get('source') or 'its source'}" if checkpoint.get("plan") else "no"
    for run in checkpoint.get("finetune") or ():
        yield "fine-tuned", ", ".join(f"{key.replace('_', ' ')} {value:,.6g}" for key, value in run.items() if value is not None)
    for file, digest in (checkpoint.get("sha256") or {}).items():
        yield f"sha256 of {file}", digest
    for key, value in result.settings.items():
        if value not in (None, {}, []):
            yield f"setting: {key}", value if isinstance(value, str) else json.dumps(value)
    yield "versions", ", ".join(f"{package} {version}" for package, version in result.versions.items())
    yield "machine", ", ".join(f"{key} {value}" for key, value in result.machine.items())
    yield "measured", result.created


def _grid(name: str, task: TaskResult) -> Table:
    x, y = list(task.axes)[:2]
    samples = sorted({cell.rows for cell in task.cells})
    rows = [[number(below), *(_at(task, **{x: across, y: below}) for across in task.values(x))] for below in task.values(y)]
    rows.append(["all", *(_at(task, **{x: across}) for across in task.values(x))])
    return Table(
        [f"{y} \\ {x}", *map(number, task.values(x))],
        rows,
        title=f"{task.name}: {task.metric} of {name}",
        caption=f"95 % intervals; {'/'.join(map(str, samples))} prompts a cell",
    )


def _at(task: TaskResult, **at: float) -> str:
    return with_interval(task, task.pooled(**at)) if task.select(**at) else ""


def _list(name: str, task: TaskResult) -> Table:
    extra = sorted({key for cell in task.cells for key in cell.extra})
    head = [*task.axes.values(), task.metric, "n", "rows", *(key.replace("_", " ") for key in extra)]
    rows = [
        [
            *(number(cell.at[axis]) for axis in task.axes),
            with_interval(task, cell),
            f"{cell.n:,}",
            f"{cell.rows:,}",
            *(f"{cell.extra[key]:,.4g}" if key in cell.extra else "" for key in extra),
        ]
        for cell in sorted(task.cells, key=lambda cell: tuple(cell.at[axis] for axis in task.axes))
    ]
    return Table(head, rows, title=f"{task.name}: {task.metric} of {name}", caption="95 % intervals")
