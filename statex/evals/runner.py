"""`evaluate`: plan all tasks, load the model, run the jobs with a progress bar."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import EvaluationError
from .result import EvalResult, TaskResult, check_folder
from .subject import Subject, load_subject
from .task import Context, Options, Schedule, Task
from .tasks import get_tasks
from .text import Encoder

LENGTHS = (256, 512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_PAIRS = (4, 8, 16, 32, 64)
SAMPLES = 50


def evaluate(
    checkpoint: str | Path | nn.Module,
    tasks: Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    num_pairs: Sequence[int] | None = None,
    samples: int | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Encoder | str | Path | None = None,
    name: str | None = None,
    progress: bool = True,
) -> EvalResult:
    """Measure a checkpoint.

    Args:
        checkpoint: a checkpoint folder, a hub id, or a loaded causal language model (then with `tokenizer`).
        tasks: names from `TASKS`; by default all, those that need data only with `data`.
        out: folder for `results.json` and figures; nothing is written without it.
        lengths: prompt lengths (passkey, niah) and window lengths (perplexity), in tokens.
        depths: where needles are hidden, as fractions of the text, 0 to 1.
        num_pairs: key-value pairs of an MQAR row.
        samples: rows per grid point (prompts, MQAR rows), 50 by default; stretches of the longest window (perplexity).
        data: text file or files (.txt, .jsonl, both also .gz, .parquet): what perplexity reads and needles are hidden in.
        seed: of all draws; equal seeds and tokenizers give equal inputs, which `compare` pairs.
        batch_size: rows of a forward pass; by default as many as make 4,096 tokens on a CPU, 65,536 elsewhere.
        device, dtype: where and in what to compute; by default the GPU if there is one, and fp32 on a CPU.
        tokenizer: a tokenizer, its folder or hub id; by default the checkpoint's own.
        name: what reports call the checkpoint; by default its folder's name.
        progress: show a progress bar on stderr.

    Raises:
        EvaluationError: unknown task, missing or short data, no tokenizer, options out of range, not enough memory.
        CheckpointError: the checkpoint cannot be read.
    """
    if out is not None:
        check_folder(out)
    chosen = get_tasks(tasks, have_data=data is not None)
    options = Options(
        lengths=_positive(lengths, LENGTHS, "lengths"),
        depths=tuple(float(depth) for depth in depths or DEPTHS),
        num_pairs=_positive(num_pairs, NUM_PAIRS, "num_pairs"),
        samples=_positive(None if samples is None else [samples], (SAMPLES,), "samples")[0],
        seed=_seed(seed),
        data=tuple(data) if data is not None and not isinstance(data, str | Path) else data,
    )
    subject = load_subject(checkpoint, tokenizer=tokenizer, batch_size=batch_size, device=device, dtype=dtype)
    context = Context(subject.tokenizer, options)
    schedules = [(task, task.schedule(context)) for task in chosen]
    with subject.evaluation_mode():
        measured = _run(schedules, subject, progress)
    result = EvalResult(
        checkpoint=subject.identity | ({"name": name} if name else {}),
        tasks=measured,
        settings={
            "tasks": [task.name for task in chosen],
            "lengths": list(options.lengths),
            "depths": list(options.depths),
            "num_pairs": list(options.num_pairs),
            "samples": options.samples,
            "data": context.source or None,
            "seed": seed,
            "batch_size": batch_size,
            "device": str(subject.device),
            "dtype": str(subject.dtype).removeprefix("torch."),
        },
        versions=versions(),
        machine=machine(subject.device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if out is not None:
        result.save(out)
    return result


def _run(schedules: Sequence[tuple[Task, Schedule]], subject: Subject, progress: bool) -> dict[str, TaskResult]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    results: dict[str, TaskResult] = {}
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        for task, schedule in schedules:
            line = bar.add_task(task.name, total=sum(job.rows for job in schedule.jobs))
            began, cells = time.perf_counter(), []
            for job in schedule.jobs:
                bar.update(line, description=f"{task.name}: {job.label}")
                cells += job.run(subject, partial(bar.advance, line))
            bar.update(line, description=task.name)
            results[task.name] = TaskResult(
                name=task.name,
                metric=schedule.metric,
                axes=schedule.axes,
                cells=cells,
                chance=schedule.chance,
                notes=list(schedule.notes),
                seconds=round(time.perf_counter() - began, 2),
            )
    return results


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"statex": __version__, "python": platform.python_version()} | {
        package: version(package) for package in ("torch", "transformers", "numpy")
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What computed: system, processor or GPU, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"system": platform.system(), "device": name, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}


def _positive(values: Sequence[int] | None, default: tuple[int, ...], where: str) -> tuple[int, ...]:
    found = tuple(values) if values else default
    for value in found:
        if value != int(value) or value < 1:
            raise EvaluationError(f"{value} is not a whole number from 1", where=where, fix="Give positive whole numbers")
    return tuple(int(value) for value in found)


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise EvaluationError(f"the seed is {seed}", where="seed", fix="Give a whole number from 0")
    return seed
