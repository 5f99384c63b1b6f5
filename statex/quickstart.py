"""The whole path on an embedded checkpoint, on a CPU, in minutes: inspect, expand, verify, finetune, eval, export.

The checkpoint is a byte-level GLA of 1 M parameters (`examples/pretrain_tiny.py --preset gla-quickstart`), trained on public-domain
books and on key-value rows of which its state can hold about sixteen. It is expanded with `lift_keys`, which keeps its function and
multiplies its state, and trained briefly. A second run gives the *unexpanded* checkpoint the same training: what that one does
not gain comes from the larger state.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .checkpoints import inspect_checkpoint
from .errors import StatexError
from .evals import compare, evaluate, verify
from .evals.result import Cell, EvalResult
from .evals.verification import VerifyReport
from .models.remote_code import export_hf
from .recipes import finetune
from .surgery import expand_checkpoint

ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = ASSETS / "gla-quickstart"
TRAIN, HELD_OUT = ASSETS / "books_train.jsonl.gz", ASSETS / "books_test.jsonl.gz"
NUM_PAIRS = (16, 32, 64, 128)
SAMPLES = 32
"""Rows of each MQAR size and windows of held-out text."""

NAMES = ("as released", "control", "expanded", "fine-tuned")


def run(out: Path, *, force: bool = False, steps: int | None = None) -> dict[str, EvalResult]:
    """Run every step, each as the command of that name would, and print one table at the end.

    Args:
        out: folder for everything that is made.
        force: write into `out` although it is not empty, replacing what an earlier run left there.
        steps: of fine-tuning, instead of the recipe's.
    Returns:
        The four evaluations, by the names in `NAMES`.
    Raises:
        StatexError: `out` is not empty.
    """
    if not force and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StatexError(
            "the output folder is not empty", where=str(out), fix="Choose another with -o, or replace it with --force"
        )
    console, started = Console(markup=False, highlight=False), time.perf_counter()
    overrides = {} if steps is None else {"schedule.max_steps": steps}

    def step(number: int, command: str) -> None:
        console.rule(f"{number} of 7  {command}", align="left")

    step(1, "statex inspect gla-quickstart")
    console.print(inspect_checkpoint(CHECKPOINT).table())
    step(2, "statex expand gla-quickstart --operator lift_keys --layers all -o expanded")
    summary = expand_checkpoint(CHECKPOINT, out / "expanded", operator="lift_keys", layers="all", force=True)
    console.print(summary.table())
    step(3, "statex verify gla-quickstart expanded")
    report = verify(CHECKPOINT, out / "expanded")
    console.print(report.table())
    step(4, "statex finetune expanded --recipe quickstart -o trained")
    finetune(out / "expanded", "quickstart", TRAIN, out / "trained", overrides=overrides, force=True)
    step(5, "statex finetune gla-quickstart --recipe quickstart -o control")
    finetune(CHECKPOINT, "quickstart", TRAIN, out / "control", overrides=overrides, force=True)
    step(6, "statex eval of all four, statex compare")
    results = {}
    for name, checkpoint in zip(NAMES, (CHECKPOINT, out / "control", out / "expanded", out / "trained"), strict=True):
        results[name] = evaluate(
            checkpoint, ["mqar", "perplexity"], num_pairs=NUM_PAIRS, lengths=[512], samples=SAMPLES, data=HELD_OUT, name=name
        )
    compare(list(results.values()), out / "compare", names=NAMES)
    step(7, "statex export trained --to hf -o exported")
    export_hf(out / "trained", out / "exported", force=True)
    table = _table(report, results)
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(table)
    console.rule("result", align="left")
    console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s. The texts and rows that measured were not trained on.")
    for what, where in {
        "report": "report.txt",
        "plots": "compare/compare_mqar.png",
        "numbers": "compare/compare.csv",
        "for plain transformers, trust_remote_code=True": "exported",
    }.items():
        console.print(f"  {what}: {out / where}", soft_wrap=True)
    return results


def _table(report: VerifyReport, results: dict[str, EvalResult]) -> Table:
    """One row a checkpoint: bits per byte and the share of values recalled by number of pairs, with 95 % intervals."""
    before, after = report.state_elements or (1, 1)
    table = Table(
        title=f"state ×{after / before:g}, parameters +{100 * report.parameter_growth:.2f} %, "
        f"largest logit difference at step 0: {report.max_difference:.1e} (tolerance {report.tolerance:.1e})",
        title_justify="left",
        caption="Share of values recalled from n key-value pairs, in %, and bits per byte of held-out books, with 95 % intervals. "
        "Control: the same training, not expanded.",
        caption_justify="left",
    )
    table.add_column("checkpoint")
    table.add_column("bits/byte", justify="right")
    for num_pairs in NUM_PAIRS:
        table.add_column(f"{num_pairs} pairs", justify="right")
    for name, result in results.items():
        text = result.tasks["perplexity"].pooled()
        recall = [result.tasks["mqar"].pooled(num_pairs=num_pairs) for num_pairs in NUM_PAIRS]
        table.add_row(name, _with_interval(text, 1, 3), *(_with_interval(cell, 100, 1) for cell in recall))
    return table


def _with_interval(cell: Cell, factor: float, digits: int) -> str:
    low, high = (cell.value if end is None else end for end in (cell.low, cell.high))
    return f"{factor * cell.value:.{digits}f}\n{factor * low:.{digits - 1}f}–{factor * high:.{digits - 1}f}"
