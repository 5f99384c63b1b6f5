"""The CSV of `recovery.py`: one number a line, blocks appended by several processes."""

from __future__ import annotations

import csv
import fcntl
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = (
    "family", "params", "arm", "factor", "layers", "seed", "tokens", "task", "metric", "value", "train_s",
    "base", "axis", "step", "steps", "batch", "learning_rate", "new", "expanded", "rest", "state", "eager", "at_once",
    "device", "torch", "backend",
)  # fmt: skip
IDENTITY = ("base", "arm", "seed", "steps", "batch")


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add a block of lines, behind a header if it is the first, in one write that no other process comes between."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, io.SEEK_END)
        before = ",".join(COLUMNS) + "\n" if end == 0 else ""
        if end:
            file.seek(end - 1)
            before = "" if file.read(1) == b"\n" else "\n"  # a process was killed while it wrote
        file.write((before + text.getvalue()).encode())


def lines(path: Path) -> list[dict[str, str]]:
    """All whole lines."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [line for line in csv.DictReader(file) if None not in line.values()]


def known_runs(path: Path, task: str) -> set[tuple[str, ...]]:
    """Identities of the runs that have a line of this task."""
    return {tuple(line[name] for name in IDENTITY) for line in lines(path) if line["task"] == task}
