"""How numbers are written in reports, and the tables that commands print on a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .result import ACCURACY, Cell, EvalResult, TaskResult

if TYPE_CHECKING:
    from .capacity import Capacity
    from .comparison import Comparison
    from .diagnosis import Diagnosis
    from .statistics import Difference
    from .verification import VerifyReport


def number(x: float) -> str:
    """A coordinate as people write it: whole numbers without a point."""
    return f"{x:g}"


def score(task: TaskResult, value: float) -> str:
    """A value of the task's metric: bits per byte with three digits, shares with two."""
    return f"{value:.2f}" if task.metric == ACCURACY else f"{value:.3f}"


def with_interval(task: TaskResult, cell: Cell) -> str:
    """`0.84 [0.71, 0.92]`; `?` for a bound that a single row does not give."""
    bounds = ", ".join("?" if bound is None else score(task, bound) for bound in (cell.low, cell.high))
    return f"{score(task, cell.value)} [{bounds}]"


def difference_text(task: TaskResult, gain: Difference | None, *, both: bool) -> str:
    """`+0.12 [+0.08, +0.16] better`, or that no difference is shown, with the interval that says how large it could be."""
    if gain is None:
        return "other inputs" if both else ""
    text = change_text(gain, 2 if task.metric == ACCURACY else 3)
    if not gain.shown:
        return f"{text}, no difference shown"
    return f"{text} {'better' if (gain.value > 0) == task.higher_is_better else 'worse'}"


def change_text(gain: Difference, digits: int = 2) -> str:
    """`+0.12 [+0.08, +0.16]`."""
    low, high = ("?" if not math.isfinite(bound) else signed(bound, digits) for bound in (gain.low, gain.high))
    return f"{signed(gain.value, digits)} [{low}, {high}]"


def signed(value: float, digits: int) -> str:
    """A number with its sign, none for what rounds to 0."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '-'}{text}"


def p_text(p: float) -> str:
    """A p-value with as many digits as mean something."""
    return "<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"{p:.3f}"


def capacity_text(found: Capacity, items: list[float]) -> str:
    """`48.5 [46.7, 50.6]`; `> 128` or `< 4` where the level lies beyond what was measured."""
    if found.value is None:
        return f"> {number(items[-1])}" if found.beyond == "above" else f"< {number(items[0])}"
    low = f"< {number(items[0])}" if found.low is None else f"{found.low:.3g}"
    high = f"> {number(items[-1])}" if found.high is None else f"{found.high:.3g}"
    return f"{found.value:.3g} [{low}, {high}]"


def result_table(result: EvalResult) -> Group:
    """One table a task, with its notes and capacities below."""
    from .reports.evaluating import task_blocks
    from .reports.terminal import render

    return render([block for task in result.tasks.values() for block in task_blocks(result.name, task)])


def comparison_table(comparison: Comparison) -> Group:
    """One table a task: a column for each checkpoint, and for each but the first its difference from the first.

    Of a grid only the rows that pool its further axes are shown; all are in `Comparison.rows` and in the files that it saves.
    """
    from .reports.comparing import compared_blocks
    from .reports.terminal import render

    return render([block for task in comparison.tasks for block in compared_blocks(comparison, task)])


def diagnosis_table(diagnosis: Diagnosis) -> Group:
    """Recall lost by layer and head, states, gates, and the advice."""
    from .reports.diagnosing import finding_blocks
    from .reports.terminal import render

    return render(finding_blocks(diagnosis))


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
