"""How a run is told: log.csv, TensorBoard events, and a progress bar or plain lines."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

COLUMNS = ("step", "loss", "lr", "tokens", "tokens_per_s", "grad_norm", "eval_loss", "opened")
"""`loss` in nats per token, mean since the last line; `tokens` since the start of the run; `eval_loss` on held-out data;
`opened`: how far what surgery added has moved from where it does nothing, as a root mean square."""

Record = dict[str, float]


class Reporter:
    """Writes the records of a run.

    Args:
        out: the run's folder; lines of `log.csv` after `start` (of a run that is resumed from there) are dropped.
        start, total: steps done before, and of the whole run.
        progress: whether to write to the console.
    """

    def __init__(self, out: Path, *, start: int, total: int, progress: bool) -> None:
        self.total = total
        self.console = Console(stderr=True, quiet=not progress)
        self.path = out / "log.csv"
        kept = [row for row in read_log(self.path) if row["step"] <= start] if start else []
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)
        for row in kept:
            self._append(row)
        self.events = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1 if start else None)
        self.bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (progress and self.console.is_terminal),
        )
        self.task = self.bar.add_task("train", total=total, completed=start, told="")
        self.bar.start()

    def step(self, step: int) -> None:
        """A step is done."""
        self.bar.update(self.task, completed=step)

    def log(self, record: Record) -> None:
        """Write a record (keys of `COLUMNS`, some may be missing) everywhere."""
        self._append(record)
        step = int(record["step"])
        for name, value in record.items():
            if name != "step":
                self.events.add_scalar(name, value, step)
        told = _told(record)
        if self.bar.disable:
            self.console.print(f"step {step}/{self.total}  {told}", highlight=False)
        else:
            self.bar.update(self.task, told=told)

    def tell(self, text: str) -> None:
        """A line on the console alone."""
        self.console.print(text, highlight=False)

    def close(self) -> None:
        """Flush everything and give the console back."""
        self.bar.stop()
        self.events.close()

    def _append(self, record: Record) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([_cell(record.get(name)) for name in COLUMNS])


def read_log(path: Path) -> list[Record]:
    """The records of a log.csv; empty when there is none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    # Nine digits tell any two fp32 numbers apart.
    return str(int(value)) if value == int(value) else f"{value:.9g}"


def _told(record: Record) -> str:
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s")
    if "opened" in record:
        parts.append(f"opened {record['opened']:.3g}")
    if "eval_loss" in record:
        parts.append(f"held-out loss {record['eval_loss']:.4f}")
    return "  ".join(parts)
