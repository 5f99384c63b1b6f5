"""What a comparison says."""

from __future__ import annotations

from ..comparison import Comparison, Row
from ..report import difference_text, number, p_text, with_interval
from ..result import TaskResult
from .document import Block, Document, Heading, Notes, Picture, Table
from .evaluating import capacity_blocks, plan_blocks, provenance_table


def comparison_document(comparison: Comparison) -> Document:
    """The verdict on each task, figures and tables, capacity by state size, plans, provenance."""
    from ..plots import state_plot, task_figures

    named = list(zip(comparison.names, comparison.results, strict=True))
    blocks: list[Block] = [Heading("Summary"), *verdict_blocks(comparison)]
    for task in comparison.tasks:
        blocks.append(Heading(task))
        for name, figure in task_figures(comparison.series(task)).items():
            blocks.append(
                Picture(figure, f"compare_{name}", f"{task} of {', '.join(comparison.names)}; the tables have the numbers")
            )
        by_state = state_plot(named, task)
        if by_state is not None:
            blocks.append(Picture(by_state, f"compare_{task}_state", f"items held on {task} by size of the state"))
        blocks += compared_blocks(comparison, task)
        blocks += _every_point(comparison, task)
    for name, result in named:
        blocks += plan_blocks(name, result.checkpoint)
    for name, result in named:
        blocks += [Heading(f"Provenance of {name}"), provenance_table(result)]
    return Document(f"Comparison of {', '.join(comparison.names)}", blocks)


def verdict_blocks(comparison: Comparison) -> list[Block]:
    """A line for each task and checkpoint: its difference from the first over all questions, or over the longest window."""
    rows = []
    for name in comparison.tasks:
        row = comparison.summary(name) or _last(comparison, name)
        task = comparison.series(name)[0][1]
        for checkpoint, cell, gain in list(zip(comparison.names, row.cells, row.differences, strict=True))[1:]:
            if cell is not None:
                text = difference_text(task, gain, both=row.cells[0] is not None)
                rows.append(
                    [name, _where(row), checkpoint, text, "" if gain is None else p_text(gain.p), gain.test if gain else ""]
                )
    head = ["task", "over", "checkpoint", f"difference from {comparison.names[0]}", "p", "test"]
    notes = [
        'paired tests on the same rows, 95 % intervals; "no difference shown" means that the data are compatible with none, and '
        "the interval says how large it could still be"
    ]
    return [Table(head, rows, words=frozenset({0, 1, 2, 3, 5})), Notes(notes)]


def compared_blocks(comparison: Comparison, name: str) -> list[Block]:
    """The task's table by its first axis, and how many times more items are held."""
    task = comparison.series(name)[0][1]
    x, *others = task.axes
    pooled = "".join(f"; all values of {other} pooled" for other in others)
    rows = [row for row in comparison.rows if row.task == name and list(row.at) in ([x], [])]
    table = Table(
        [x.replace("_", " "), comparison.names[0], *(cell for each in comparison.names[1:] for cell in (each, "difference"))],
        [[number(row.at[x]) if row.at else "all", *_cells(task, row)] for row in rows],
        title=f"{name}: {task.metric}",
        caption="95 % intervals; differences are from the first checkpoint, over the same inputs; whether one is shown is judged "
        f"at 5 % after Holm's correction for the {sum(bool(row.at) for row in rows)} rows{pooled}",
    )
    return [table, *_capacities(comparison, name, task)]


def _capacities(comparison: Comparison, name: str, task: TaskResult) -> list[Block]:
    curves = [(checkpoint, curve) for checkpoint, each in comparison.series(name) for curve in each.curves]
    blocks = capacity_blocks(task, curves)
    rows = []
    for checkpoint, ratios in comparison.capacity_ratios[name].items():
        for at, ratio in ratios:
            low, high = ("?" if bound is None else f"{bound:.2f}" for bound in (ratio.low, ratio.high))
            place = ", ".join(f"{axis} {number(value)}" for axis, value in at.items())
            rows.append([checkpoint, place or "all", f"{ratio.level:.0%}", f"×{ratio.value:.2f} [{low}, {high}]"])
    if rows:
        head = ["checkpoint", "at", "recall", f"items held, times {comparison.names[0]}"]
        caption = "one bootstrap over the rows that both read; a ratio needs both capacities within the numbers of items asked"
        blocks.append(
            Table(head, rows, title=f"{name}: capacity against {comparison.names[0]}", caption=caption, words=frozenset({0, 1}))
        )
    return blocks


def _every_point(comparison: Comparison, name: str) -> list[Block]:
    """All grid points of a task with several axes."""
    task = comparison.series(name)[0][1]
    rows = [row for row in comparison.rows if row.task == name and len(row.at) > 1]
    if not rows:
        return []
    head = ["at", comparison.names[0], *(cell for each in comparison.names[1:] for cell in (each, "difference"))]
    caption = f"judged at 5 % after Holm's correction for the {len(rows)} points"
    return [
        Table(
            head,
            [[_where(row), *_cells(task, row)] for row in rows],
            title=f"{name}: every point",
            caption=caption,
            words=frozenset({0}),
        )
    ]


def _cells(task: TaskResult, row: Row) -> list[str]:
    texts = []
    for index, (cell, gain) in enumerate(zip(row.cells, row.differences, strict=True)):
        texts.append("" if cell is None else with_interval(task, cell))
        if index:
            texts.append(difference_text(task, gain, both=cell is not None and row.cells[0] is not None))
    return texts


def _last(comparison: Comparison, name: str) -> Row:
    """The row of the last coordinate along the first axis that is pooled over the others, or the last there is."""
    rows = [row for row in comparison.rows if row.task == name]
    return [row for row in rows if len(row.at) == 1 or row is rows[-1]][-1]


def _where(row: Row) -> str:
    return ", ".join(f"{axis} {number(value)}" for axis, value in row.at.items()) or "all questions"
