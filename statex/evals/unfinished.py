"""What a long evaluation has measured so far, beside its output folder, so that an interrupted one can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .result import Cell


class Unfinished:
    """The cells of finished jobs in `OUT.unfinished.jsonl`: a line that says what is measured, then a line a job.

    The file appears with the first finished job and goes when the evaluation is complete.
    """

    def __init__(self, out: str | Path, measured: Mapping[str, Any], *, resume: bool) -> None:
        """Raises `EvaluationError` when there is nothing to resume, or something else was measured."""
        folder = Path(out).expanduser().absolute()
        self.path = folder.with_name(f"{folder.name}.unfinished.jsonl")
        self._header = json.loads(json.dumps({"measured": dict(measured)}))
        self._done: dict[tuple[str, str], list[Cell]] = {}
        self.begun = False
        if resume:
            self._read()

    def cells(self, task: str, job: str) -> list[Cell] | None:
        """What a job gave before the interruption."""
        return self._done.get((task, job))

    def add(self, task: str, job: str, cells: list[Cell]) -> None:
        """Keep what a job gave. Raises `EvaluationError` where nothing can be written."""
        try:
            if not self.begun:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self._header) + "\n", encoding="utf-8")
                self.begun = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": task, "job": job, "cells": [asdict(cell) for cell in cells]}) + "\n")
        except OSError as error:
            what = f"the results cannot be written: {error.strerror or error}"
            raise EvaluationError(what, where=str(self.path), fix="Make room, or choose another -o") from error

    def remove(self) -> None:
        """The evaluation is complete."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        if not self.path.is_file():
            raise EvaluationError(
                "there is no unfinished evaluation to resume", where=str(self.path), fix="Run it again without --resume"
            )
        lines = [line for line in map(_parse, self.path.read_text(encoding="utf-8").splitlines()) if line is not None]
        before = lines[0].get("measured", {}) if lines else {}
        now = self._header["measured"]
        other = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if other:
            raise EvaluationError(
                f"the unfinished evaluation differs in {', '.join(other)}",
                where=str(self.path),
                fix="Give the same checkpoint and options, or run it again without --resume",
            )
        self._done = {(line["task"], line["job"]): [Cell(**cell) for cell in line["cells"]] for line in lines[1:]}
        # A line that was cut off must not be continued.
        kept = [self._header, *lines[1:]]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.begun = True


def _parse(line: str) -> dict[str, Any] | None:
    """A line as written; None for one that was cut off."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
