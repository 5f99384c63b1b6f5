"""Tasks of lm-evaluation-harness on our checkpoints, with our states and batches; their samples become cells like any other."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import EvaluationError
from ..models.named import first_line
from .result import ACCURACY, BITS_PER_BYTE, Cell, TaskResult, digest, make_cell
from .subject import Subject
from .unfinished import Unfinished

PREFERRED = ("contains", "acc", "exact_match", "em", "f1")
"""Which of a task's metrics is reported first; all others stand beside it."""

FILES = (".yaml", ".yml")


class Harness:
    """The tasks that were asked for, with their data at hand.

    Args:
        names: of tasks, groups or tags, or paths of task files (.yaml).
        samples: questions of a task at most; None means all, which is what papers report.
        shots: examples in a prompt; None means each task's own number.

    Raises:
        EvaluationError: lm-eval is not installed, does not know a name (the nearest is suggested), or cannot load a task's data.
    """

    def __init__(self, subject: Subject, names: Sequence[str], *, samples: int | None, shots: int | None) -> None:
        self.subject, self.samples, self.shots = subject, samples, shots
        try:
            # Its own tasks are thousands of files, which a user's task files do without.
            self._manager = _task_manager(not all(name.strip().endswith(FILES) for name in names))
        except ImportError as error:
            raise EvaluationError(
                f"lm-eval cannot be imported ({error})", where="lm_eval", fix="Install it with pip install 'statex[eval]'"
            ) from error
        self.names = self._known(names)
        self._loaded = {name: self._load(name) for name in self.names}

    def _known(self, names: Sequence[str]) -> list[str]:
        found = list(dict.fromkeys(name.strip() for name in names))
        for name in found:
            if name not in self._manager.all_tasks and not (name.endswith(FILES) and Path(name).is_file()):
                near = difflib.get_close_matches(name, self._manager.all_tasks, n=1)
                raise EvaluationError(
                    f"lm-eval has no task {name!r}",
                    where="lm_eval",
                    fix=f"Did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them; a task file ends with .yaml",
                )
        return found

    def _load(self, name: str) -> dict[str, Any]:
        """A task with its data, by name; a group gives all of its tasks."""
        try:
            return dict(self._manager.load([name])["tasks"])
        except Exception as error:  # datasets, the hub and task files raise dozens of kinds
            raise EvaluationError(
                f"the data of lm-eval's task {name} cannot be loaded ({first_line(error)})",
                where="lm_eval",
                fix="lm-eval fetches them from the hub: run once with a network, or give a task file (.yaml) that names local data",
            ) from error

    def run(self, kept: Unfinished | None = None) -> dict[str, TaskResult]:
        """Results by task, as `lm_eval_NAME`."""
        results: dict[str, TaskResult] = {}
        for name, tasks in self._loaded.items():
            began, before = perf_counter(), kept.cells("lm_eval", name) if kept else None
            if before is not None:
                results |= {_key(task): self._result(task, [cell], 0.0) for task, cell in zip(tasks, before, strict=True)}
                continue
            found = self._evaluate(list(tasks.values()))
            cells = {task: _cell(task, found) for task in tasks}
            if kept:
                kept.add("lm_eval", name, list(cells.values()))
            seconds = round((perf_counter() - began) / len(cells), 2)
            results |= {_key(task): self._result(task, [cell], seconds) for task, cell in cells.items()}
        return results

    def _evaluate(self, tasks: list[Any]) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        from .lm_eval_model import SubjectLM

        found: dict[str, Any] = simple_evaluate(
            model=SubjectLM(self.subject),
            tasks=tasks,
            num_fewshot=self.shots,
            limit=self.samples,
            bootstrap_iters=0,
            task_manager=self._manager,
        )
        return found

    def _result(self, task: str, cells: list[Cell], seconds: float) -> TaskResult:
        metric = BITS_PER_BYTE if "log_likelihood" in cells[0].extra else ACCURACY
        notes = [f"task {task} of lm-eval {version('lm-eval')}, its prompts and scores"]
        if cells[0].extra:
            notes.append("its own metrics stand beside")
        return TaskResult(_key(task), metric, {"shots": "examples in the prompt"}, cells, None, notes, seconds)


@cache
def _task_manager(include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    # It warns of settings that task files leave out.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=include_defaults)


def _key(task: str) -> str:
    """The task's name in results, which is a file name as well."""
    return f"lm_eval_{task}"


def _cell(task: str, found: Mapping[str, Any]) -> Cell:
    """One cell of a task's samples. Raises `EvaluationError` if no metric of it has a value between 0 and 1 for each of them."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    at = {"shots": float(found["n-shot"].get(task) or 0)}
    inputs = digest([np.array([int(sample["prompt_hash"][:12], 16) for sample in samples])])
    table = {key.split(",")[0]: value for key, value in found["results"][task].items() if isinstance(value, float | int)}
    extra = {key: float(value) for key, value in table.items() if not key.endswith("_stderr") and math.isfinite(value)}
    extra.pop("sample_len", None)
    if all("bits_per_byte" in sample for sample in samples):
        pairs = np.array([sample["bits_per_byte"] for sample in samples], dtype=float)
        extra["log_likelihood"] = float(pairs[:, 0].sum())
        return make_cell(BITS_PER_BYTE, at, -pairs[:, 0] / math.log(2), pairs[:, 1].astype(int), inputs, extra)
    metric = next((name for name in (*PREFERRED, *extra) if all(_is_share(sample.get(name)) for sample in samples)), None)
    if metric is None:
        raise EvaluationError(
            f"lm-eval's task {task} has no metric from 0 to 1 for each sample", where="lm_eval", fix="Run it with lm-eval itself"
        )
    values = np.array([float(sample[metric]) for sample in samples])
    extra.pop(metric, None)
    return make_cell(ACCURACY, at, values, np.ones(len(values), dtype=int), inputs, extra)


def _is_share(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.integer | np.floating) and 0 <= float(value) <= 1
