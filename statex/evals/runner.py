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
from .harness import Harness
from .listed import listed
from .result import EvalResult, TaskResult, check_folder
from .subject import Subject, load_subject
from .task import Context, Options, Schedule, Task
from .tasks import get_suites, get_tasks
from .text import Encoder
from .unfinished import Unfinished

LENGTHS = (256, 512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_PAIRS = (4, 8, 16, 32, 64)
SAMPLES = 50


def evaluate(
    checkpoint: str | Path | nn.Module,
    tasks: str | Sequence[str] | None = None,
    *,
    suites: str | Sequence[str] | None = None,
    lm_eval: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    lengths: int | Sequence[int] | None = None,
    depths: float | Sequence[float] | None = None,
    num_pairs: int | Sequence[int] | None = None,
    samples: int | None = None,
    shots: int | Sequence[int] | None = None,
    needles: int | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Encoder | str | Path | None = None,
    name: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> EvalResult:
    """Measure a checkpoint. Options that take several values take one alone as well.

    Args:
        checkpoint: a checkpoint folder, a hub id, or a loaded causal language model (then with `tokenizer`), which stays as it is.
        tasks: names from `TASKS`; by default mqar, passkey, niah and, with `data`, perplexity.
        suites: names from `SUITES`, whose tasks follow `tasks`. A suite's task that lacks something (data, a length with room for
            it) is left out, with its reason in `settings["left_out"]`; a task asked for by name must run.
        lm_eval: tasks of the package lm-eval to run on this model, by its names.
        out: folder for `results.json` and figures; nothing is written without it.
        lengths: prompt lengths (needles, pages, copying) and window lengths (perplexity), in tokens.
        depths: where needles are hidden, as fractions of the text, 0 to 1.
        num_pairs: key-value pairs of an MQAR row, items of a list.
        samples: rows per grid point (prompts, MQAR rows, questions), 50 by default; stretches of the longest window (perplexity).
        shots: examples in a prompt; by default 2 for reading and 2, 8, 32, 128 for in-context learning.
        needles: needles of a text in the forms with several, 4 by default.
        data: text file or files (.txt, .jsonl, both also .gz, .parquet): what perplexity reads and needles are hidden in.
        data_dir: folder with the question sets that tasks read (`sources.py` lists their files).
        seed: of all draws; equal seeds and tokenizers give equal inputs, which `compare` pairs.
        batch_size: rows of a forward pass; by default as many as make 4,096 tokens on a CPU, 65,536 elsewhere.
        device, dtype: where and in what to compute; by default the GPU if there is one, and fp32 on a CPU. A loaded model is
            measured where and as it is, and with another device or dtype as a copy, which needs memory of its own.
        tokenizer: a tokenizer, its folder or hub id; by default the checkpoint's own.
        name: what reports call the checkpoint; by default its folder's name.
        resume: go on where an interrupted evaluation into `out` stopped; its finished jobs stand beside it, in
            `OUT.unfinished.jsonl`.
        progress: show a progress bar on stderr.

    Raises:
        EvaluationError: unknown task or suite, missing or short data, no tokenizer, options out of range, not enough memory,
            nothing to resume, lm-eval or the data of its tasks missing.
        StatexError: an unknown dtype, or a device that is not there.
        CheckpointError: the checkpoint cannot be read.
    """
    if out is not None:
        check_folder(out)
    if resume and out is None:
        raise EvaluationError(
            "nothing is kept without an output folder", where="resume", fix="Give the --out of the interrupted run"
        )
    tasks, suites, lm_eval = (listed(names) for names in (tasks, suites, lm_eval))
    named = get_tasks(tasks, have_data=data is not None) if tasks is not None or not (suites or lm_eval) else []
    of_suites = [task for task in (get_suites(suites) if suites is not None else []) if task not in named]
    options = Options(
        lengths=_whole(lengths, LENGTHS, "lengths"),
        lengths_given=bool(listed(lengths)),
        depths=tuple(float(depth) for depth in listed(depths) or DEPTHS),
        num_pairs=_whole(num_pairs, NUM_PAIRS, "num_pairs"),
        samples=_whole(samples, (SAMPLES,), "samples")[0],
        seed=_seed(seed),
        data=tuple(data) if data is not None and not isinstance(data, str | Path) else data,
        data_dir=data_dir,
        shots=None if shots is None else _whole(shots, (), "shots", least=0),
        needles=4 if needles is None else needles,
    )
    _check_memory(options)
    subject = load_subject(checkpoint, tokenizer=tokenizer, batch_size=batch_size, device=device, dtype=dtype)
    context = Context(subject.tokenizer, options)
    schedules, left_out = _plan(named, of_suites, context)
    settings = {
        "lengths": list(options.lengths),
        "depths": list(options.depths),
        "num_pairs": list(options.num_pairs),
        "samples": options.samples,
        "shots": None if options.shots is None else list(options.shots),
        "needles": options.needles,
        "data": context.source or None,
        "seed": seed,
        "batch_size": batch_size,
        "device": str(subject.device),
        "dtype": str(subject.dtype).removeprefix("torch."),
    }
    identity = subject.identity | ({"name": name} if name else {})
    kept = None
    if out is not None:
        measured = {key: identity.get(key) for key in ("name", "parameters", "sha256")} | settings
        kept = Unfinished(out, measured, resume=resume)
    harness = None
    if lm_eval is not None:
        harness = Harness(subject, lm_eval, samples=samples, shots=None if options.shots is None else options.shots[0])
    try:
        with subject.evaluation_mode():
            found = _run(schedules, subject, kept, progress)
            if harness is not None:
                found |= harness.run(kept)
    except BaseException as stop:
        if kept is not None and kept.begun:
            stop.add_note(f"Go on with the same command and --resume; {kept.path.name} holds what is done")
        raise
    result = EvalResult(
        checkpoint=identity,
        tasks=found,
        settings={"tasks": list(found), **settings, "left_out": left_out},
        versions=versions(),
        machine=machine(subject.device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if out is not None:
        result.save(out)
    if kept is not None:
        kept.remove()
    return result


def _plan(named: Sequence[Task], of_suites: Sequence[Task], context: Context) -> tuple[list[tuple[Task, Schedule]], dict[str, str]]:
    """Schedules, and why tasks of suites were left out."""
    schedules, left_out = list[tuple[Task, Schedule]](), dict[str, str]()
    for task in named:
        try:
            schedules.append((task, task.schedule(context)))
        except EvaluationError as error:
            if len(named) == 1:
                raise
            raise EvaluationError(f"{task.name}: {error.what}", where=error.where, fix=error.fix) from error
    for task in of_suites:
        try:
            schedules.append((task, task.schedule(context)))
        except EvaluationError as error:
            left_out[task.name] = str(error)
    if left_out and not schedules:
        raise EvaluationError(
            f"no task of the suite can run; {next(iter(left_out))}: {next(iter(left_out.values()))}",
            where="suites",
            fix="Give --data FILE and --data-dir FOLDER, or other --lengths",
        )
    return schedules, left_out


def _check_memory(options: Options) -> None:
    """Refuse prompts that no memory could hold, before they are drawn."""
    longest, needed = max(options.lengths), 8 * max(options.lengths) * options.samples * len(options.depths)
    if hasattr(os, "sysconf") and needed > (total := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise EvaluationError(
            f"{options.samples} prompts of {longest} tokens at {len(options.depths)} depths do not fit into memory "
            f"({needed / 2**30:,.0f} of {total / 2**30:,.0f} GiB)",
            where="lengths",
            fix="Give shorter --lengths or fewer --samples",
        )


def _run(
    schedules: Sequence[tuple[Task, Schedule]], subject: Subject, kept: Unfinished | None, progress: bool
) -> dict[str, TaskResult]:
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
                before = kept.cells(task.name, job.label) if kept else None
                if before is not None:
                    bar.advance(line, job.rows)
                    cells += before
                    continue
                measured = job.run(subject, partial(bar.advance, line))
                if kept:
                    kept.add(task.name, job.label, measured)
                cells += measured
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


def _whole(values: int | Sequence[int] | None, default: tuple[int, ...], where: str, least: int = 1) -> tuple[int, ...]:
    found = tuple(listed(values) or default)
    for value in found:
        if value != int(value) or value < least:
            kind = "positive whole numbers" if least == 1 else f"whole numbers from {least}"
            raise EvaluationError(f"{value} is not a whole number from {least}", where=where, fix=f"Give {kind}")
    return tuple(int(value) for value in found)


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise EvaluationError(f"the seed is {seed}", where="seed", fix="Give a whole number from 0 to 2^63 - 1")
    return seed
