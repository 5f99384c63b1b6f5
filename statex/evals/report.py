"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .result import ACCURACY, Cell, EvalResult, TaskResult

if TYPE_CHECKING:
    from .comparison import Comparison
    from .statistics import Difference
    from .verification import VerifyReport


def number(x: float) -> str:
    """A coordinate as people write it: whole numbers without a point."""
    return f"{x:g}"


def score(task: TaskResult, value: float) -> str:
    """A value of the task's metric: accuracy with two digits, bits per byte with three."""
    return f"{value:.2f}" if task.metric == ACCURACY else f"{value:.3f}"


def result_table(result: EvalResult) -> Group:
    """One table a task, with its notes below."""
    return Group(*_interleave(_task_table(result.name, task) for task in result.tasks.values()))


def _task_table(name: str, task: TaskResult) -> Group:
    table = _grid(task) if len(task.axes) == 2 else _list(task)
    table.title, table.title_justify = f"{task.name}: {task.metric} of {name}", "left"
    notes = [*task.notes]
    if task.chance:
        notes.append(f"blind guessing scores about {task.chance:.3g}")
    return Group(table, *(Text(f"  {note}", style="dim") for note in notes))


def _grid(task: TaskResult) -> Table:
    x, y = task.axes
    samples = sorted({cell.rows for cell in task.cells})
    table = Table(caption=f"95 % intervals; {'/'.join(map(str, samples))} prompts a cell", caption_justify="left")
    table.add_column(f"{y} \\ {x}")
    for length in task.values(x):
        table.add_column(number(length), justify="right")
    for depth in task.values(y):
        row = [task.select(**{x: length, y: depth}) for length in task.values(x)]
        table.add_row(number(depth), *(_cell_text(task, cells[0]) if cells else "" for cells in row))
    table.add_section()
    table.add_row("all", *(_cell_text(task, task.pooled(**{x: length})) for length in task.values(x)))
    return table


def _list(task: TaskResult) -> Table:
    axis, label = next(iter(task.axes.items()))
    extra = sorted({key for cell in task.cells for key in cell.extra})
    table = Table(caption="95 % intervals", caption_justify="left")
    for heading in (label, task.metric, "n", "rows", *(key.replace("_", " ") for key in extra)):
        table.add_column(heading, justify="right")
    for cell in sorted(task.cells, key=lambda cell: cell.at[axis]):
        table.add_row(
            number(cell.at[axis]),
            _cell_text(task, cell),
            f"{cell.n:,}",
            f"{cell.rows:,}",
            *(f"{cell.extra[key]:,.4g}" if key in cell.extra else "" for key in extra),
        )
    return table


def _cell_text(task: TaskResult, cell: Cell) -> str:
    """`0.84 [0.71, 0.92]`; `?` for a bound that a single row does not give."""
    bounds = ", ".join("?" if bound is None else score(task, bound) for bound in (cell.low, cell.high))
    return f"{score(task, cell.value)} [{bounds}]"


def _interleave(parts: Iterable[Group]) -> list[Group | str]:
    return [item for part in parts for item in (part, "")]


def comparison_table(comparison: Comparison) -> Group:
    """One table a task: a column for each checkpoint, and for each but the first its difference from the first.

    Of a grid only the rows that pool its second axis are shown; all are in `Comparison.rows` and in the files that it saves.
    """
    return Group(*_interleave(_compared_task(comparison, task) for task in comparison.tasks))


def _compared_task(comparison: Comparison, name: str) -> Group:
    task = comparison.series(name)[0][1]
    x, *others = task.axes
    table = Table(title=f"{name}: {task.metric}", title_justify="left", caption_justify="left")
    table.caption = (
        "95 % intervals; differences are from the first checkpoint over the same inputs, not corrected for their number"
        + "".join(f"; all values of {other} pooled" for other in others)
    )
    table.add_column(x.replace("_", " "), justify="right")
    table.add_column(comparison.names[0], justify="right")
    for checkpoint in comparison.names[1:]:
        table.add_column(checkpoint, justify="right")
        table.add_column("difference", justify="right")
    for row in comparison.rows:
        if row.task == name and list(row.at) == [x]:
            texts = [number(row.at[x])]
            for index, (cell, gain) in enumerate(zip(row.cells, row.differences, strict=True)):
                texts.append("" if cell is None else _cell_text(task, cell))
                if index:
                    texts.append(_difference_text(task, gain, both=cell is not None and row.cells[0] is not None))
            table.add_row(*texts)
    return Group(table)


def _difference_text(task: TaskResult, gain: Difference | None, both: bool) -> str:
    if gain is None:
        return "other inputs" if both else ""
    if not gain.shown:
        return f"{_signed(task, gain.value)}, no difference shown"
    better = (gain.value > 0) == task.higher_is_better
    return f"{_signed(task, gain.value)} [{_signed(task, gain.low)}, {_signed(task, gain.high)}] {'better' if better else 'worse'}"


def _signed(task: TaskResult, value: float) -> str:
    digits = score(task, abs(value))
    return digits if float(digits) == 0 else f"{'+' if value > 0 else '-'}{digits}"


def verify_table(report: VerifyReport) -> Group:
    """What was compared, the measurements, and the verdict with its tolerance."""
    table = Table(title=f"verify: {report.base} and {report.expanded}", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("tokens compared", f"{report.tokens:,} ({report.text}, {report.dtype})")
    table.add_row("largest logit difference", f"{report.max_difference:.3g}")
    table.add_row("tolerance", f"{report.tolerance:.3g}")
    table.add_row("difference / RMS of logits", f"{report.relative_difference:.3g}")
    table.add_row("mean KL(base, expanded), nats", f"{report.kl:.3g}")
    table.add_row("same most likely token", f"{report.agreement:.2%}")
    if report.state_elements is not None:
        before, after = report.state_elements
        table.add_row("state elements per sequence", f"{before:,} -> {after:,} (x{report.state_growth:.3g})")
    before, after = report.parameters
    table.add_row("parameters", f"{before:,} -> {after:,} ({report.parameter_growth:+.2%})")
    notes = [f"tolerance: {report.reason}", *report.notes]
    return Group(table, *(Text(f"  {note}", style="dim") for note in notes), Text(report.verdict, style="bold"))
