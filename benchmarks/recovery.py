"""What does a short training run recover and gain after surgery? Arms at equal tokens and equal data, on the committed checkpoints.

    python benchmarks/recovery.py screen --data books_train.jsonl.gz --test books_test.jsonl.gz --devices 0,1,2,3 --minutes 8
    python benchmarks/recovery.py confirm --arms 'lpt@*,lift4,widen4' --seeds 0,1,2 --steps 500 --data ... --test ...
    python benchmarks/recovery.py screen --base big=runs/gla-30m/checkpoint --arms lpt@1e-3,lift4,merge-reinit --data ... --test ...
    python benchmarks/recovery.py screen --base gla-quickstart --oracle gla-quickstart=runs/x4/checkpoint --arms oracle --data ...
    python benchmarks/recovery.py screen --base kv=runs/kv/checkpoint --key-value-tokens 16384 ...      # pretrained with the same
    python benchmarks/recovery.py cost                       # milliseconds of a step and of a token, a run at a time
    python benchmarks/recovery.py --table --arms lpt@1e-3,lift4,merge-reinit      # the committed numbers again, and a figure

An arm (recovery_arms.py) is surgery on a base and a recipe. A step reads what a step of the base's own training read: windows of
books and MQAR rows of all numbers of pairs, drawn by a generator that the seed alone keys. Text, recall (MQAR, needles, key-value
text) and the openness of new numbers are measured at 0, 10, 25, 50 and 100 % of a run (recovery_measures.py), all on the same
held-out rows.

Each device has a process of its own, which drives several runs side by side and takes the next run that nobody has. A run's lines
are appended to the CSV as it ends; runs that have theirs are skipped, so the command resumes. A run that fails is tried once more
without graphs, and if that fails too, leaves a line with the task `error`; no run stops another. With `--minutes` no run is begun
that would not end in time. `--dry-run` does a few steps of everything on a CPU, on bases with random weights, and keeps nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import traceback
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recovery_arms import GLA, MAMBA2, choose, find
from recovery_lines import append, known_runs, lines
from recovery_measures import COST, KEY_VALUE, MORE_TEXT, MQAR
from recovery_queue import Queue, work_on_devices
from recovery_reading import ReadingRows
from recovery_runs import Base, Measured, Place, Run, Spec, TimeUp
from recovery_table import ERROR, RUN, draw, table
from side_by_side import run_side_by_side
from transformers.utils.logging import disable_progress_bar

import statex
from statex.errors import StatexError
from statex.families import get_family
from statex.models import StatexForCausalLM

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "recovery.csv"
FIGURE = ROOT / "docs" / "images" / "recovery.png"
ASSETS = Path(statex.__file__).parent / "assets"
BASES = {
    "gla-quickstart": ASSETS / "gla-quickstart",
    "mamba2-books": ROOT / "examples" / "checkpoints" / "mamba2-books",
    "gla-books": ROOT / "examples" / "checkpoints" / "gla-books",
}
DEFAULT_BASES = ("gla-quickstart", "mamba2-books")
DEFAULTS = {"screen": ([0], [300]), "confirm": ([0, 1, 2], [500]), COST: ([0], [100])}
"""Seeds and steps of each command."""
DRY = {
    "window": 256, "text_rows": 8, "mqar_tokens": 64, "max_pairs": 16, "eval_rows": 2, "interim_bytes": 1024, "final_bytes": 2048,
    "base_steps": 2, "max_entries": 4,
}  # fmt: skip
"""Sizes of a dry run."""
DONE = "done"
READING_WIDTH = 1024
"""Bytes of a page or a paragraph with its questions."""
POISONED = 3
"""Exit code of a process whose device does not answer any more."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its lines, or its error."""

    spec: Spec
    rows: list[dict[str, Any]]
    seconds: float
    error: Exception | None = None


def guarded(place: Place, kind: str, queue: Queue, spec: Spec) -> Generator[None, None, Outcome]:
    """A run that ends with an outcome whatever happens."""
    began = time.monotonic()
    try:
        run = Run(place, spec, eager=place.eager or spec in queue.retries)
        told = yield from (run.cost() if kind == COST else run.train())
        seconds = time.monotonic() - began
        if kind == RUN:
            told.append(replace(told[-1], task=RUN, metric=DONE, value=seconds))
        return Outcome(spec, [line_of(run, measured) for measured in told], seconds)
    except Exception as error:
        traceback.print_exc()
        return Outcome(spec, [], time.monotonic() - began, error)


def line_of(run: Run, measured: Measured) -> dict[str, Any]:
    """A line of the CSV."""
    family = run.base.description.family
    return identity(run.spec, run.place) | {
        "family": family,
        "params": run.parameters,
        "factor": round(run.factor, 3),
        "layers": " ".join(map(str, run.layers)),
        "tokens": measured.tokens,
        "task": measured.task,
        "metric": measured.metric,
        "value": round(measured.value, 5),
        "train_s": round(measured.train_s, 2),
        "step": measured.step,
        "state": run.state,
        "eager": int(run.backward.eager),
    }


def identity(spec: Spec, place: Place) -> dict[str, Any]:
    """What a line says about the run itself, whether it ended well or not."""
    arm = find(place.bases[spec.base].description.family, spec.arm)
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "CPU"
    return {
        "arm": spec.arm,
        "seed": spec.seed,
        "base": spec.base,
        "axis": arm.axis,
        "learning_rate": arm.rate,
        "new": arm.new,
        "expanded": arm.expanded,
        "rest": arm.rest,
        "steps": spec.steps,
        "batch": f"{spec.batch:g}",
        "at_once": place.at_once,
        "device": device,
        "torch": torch.__version__,
        "backend": place.backend,
    }


def work_list(bases: dict[str, Base], arms: Iterable[str], seeds: list[int], steps: list[int], batch: float) -> list[Spec]:
    """All runs: whole sets of arms one after another, by length and seed, in the arms' order of priority."""
    chosen = choose(arms)
    return [
        Spec(base.name, arm.name, seed, length, batch)
        for length in steps
        for seed in seeds
        for arm in chosen
        for base in bases.values()
        if base.description.family == arm.family
    ]


def missing(specs: list[Spec], results: Path, kind: str) -> list[Spec]:
    """Runs that the CSV does not hold."""
    known = known_runs(results, COST if kind == COST else RUN)
    return [spec for spec in specs if (spec.base, spec.arm, str(spec.seed), str(spec.steps), f"{spec.batch:g}") not in known]


def work(place: Place, kind: str, queue: Queue, results: Path) -> None:
    """Do the runs of the queue, and append the lines of each as it ends."""
    began = time.monotonic()
    for outcome in run_side_by_side(_Runs(place, kind, queue), place.device, place.at_once):
        told: dict[str, Any] = {"worker": queue.worker, "run": outcome.spec.name, "seconds": round(outcome.seconds, 1)}
        if outcome.error is None:
            append(results, outcome.rows)
            queue.done(outcome.spec, outcome.seconds)
            told |= shown(outcome.rows)
        else:
            reason = f"{type(outcome.error).__name__}: {str(outcome.error).splitlines()[0] if str(outcome.error) else ''}"[:200]
            told["error"] = reason
            dead = not answers(place.device)
            late = isinstance(outcome.error, TimeUp)
            if not late and (dead or isinstance(outcome.error, StatexError) or not queue.again(outcome.spec)):
                append(results, [identity(outcome.spec, place) | {"task": ERROR, "metric": reason}])
                queue.close(outcome.spec)
            if dead:
                print(json.dumps(told), flush=True)
                os._exit(POISONED)  # anything tidier would wait for the device
        told |= {"minutes": round((time.monotonic() - began) / 60, 2), "left": len(queue.specs)}
        print(json.dumps(told), flush=True)
        del outcome


class _Runs:
    """The queue's runs, ready to start."""

    def __init__(self, place: Place, kind: str, queue: Queue) -> None:
        self.place, self.kind, self.queue = place, kind, queue

    def __iter__(self) -> _Runs:
        return self

    def __next__(self) -> Any:
        return partial(guarded, self.place, self.kind, self.queue, next(self.queue))


def shown(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a progress line tells of a run's end."""
    last = {(row["task"], row["metric"]): row["value"] for row in rows if row["step"] == rows[-1]["step"]}
    wanted = {"bits": (MORE_TEXT, "bits_per_byte"), **{f"recall_{n}": (MQAR, f"accuracy_{n}") for n in (64, 128)}}
    wanted |= {f"key_value_{n}": (KEY_VALUE, f"exact_{n}") for n in (8, 16)}
    wanted |= {name: (COST, name) for name in ("train_ms", "decode_ms_batch_1")}
    return {name: last[key] for name, key in wanted.items() if key in last}


def answers(device: torch.device) -> bool:
    """Whether the device still works: some errors leave it useless to the process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            traceback.print_exc()
            return False
    return True


def random_bases(folder: Path) -> dict[str, Base]:
    """Small bases with random weights, of the default ones' families."""
    gla = {"hidden_size": 32, "num_heads": 2, "expand_k": 0.5, "use_short_conv": True, "intermediate_size": 32}
    mamba2 = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8}
    found = {}
    for name, family, config in ((DEFAULT_BASES[0], GLA, gla), (DEFAULT_BASES[1], MAMBA2, mamba2)):
        config |= {"vocab_size": 264, "num_hidden_layers": 4, "tie_word_embeddings": True}
        StatexForCausalLM.from_description(get_family(family).describe(config, {})).save_pretrained(folder / name)
        found[name] = Base(name, folder / name, auto=(0,))
    return found


def named_bases(named: list[str]) -> dict[str, Base]:
    """Bases by name: known ones, or `name=folder`."""
    found = {}
    for entry in named or DEFAULT_BASES:
        if entry in BASES:
            found[entry] = Base(entry, BASES[entry])
            continue
        ((name, folder),) = named_folders("--base", [entry], f", or one of {', '.join(BASES)}")
        found[name] = Base(name, folder)
    return found


def named_folders(option: str, entries: Iterable[str], more: str = "") -> list[tuple[str, Path]]:
    """`name=folder` apart."""
    found = []
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not folder:
            raise SystemExit(f"{option} {name}: write {name}=FOLDER{more}")
        if not Path(folder).is_dir():
            raise SystemExit(f"{option} {name}: there is no folder {folder}")
        found.append((name, Path(folder)))
    return found


def numbers(text: str) -> list[int]:
    """`0,1,2`."""
    return [int(part) for part in text.split(",")]


def existing(text: str) -> Path:
    """A file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=[*DEFAULTS])
    parser.add_argument("--table", action="store_true", help="print the CSV's final numbers as Markdown; draw the curves of --arms")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the curves go")
    parser.add_argument("--base", action="append", default=[], help=f"{', '.join(BASES)}, or NAME=FOLDER; may be repeated")
    parser.add_argument(
        "--arms", default="", help="names, patterns or axes of recovery_arms.py, with commas; all but oracles if left out"
    )
    parser.add_argument(
        "--oracle",
        action="append",
        default=[],
        help="NAME=FOLDER: what the arm `oracle` measures, a model pretrained with a large state",
    )
    parser.add_argument("--seeds", type=numbers, help="with commas")
    parser.add_argument("--steps", type=numbers, help="lengths of the runs, with commas")
    parser.add_argument("--batch", type=float, default=1.0, help="factor on the tokens of a step of the base's training")
    parser.add_argument(
        "--data", type=existing, default=ASSETS / "books_train.jsonl.gz", help="books to train on, JSONL.gz with a field `text`"
    )
    parser.add_argument("--test", type=existing, default=ASSETS / "books_test.jsonl.gz", help="held-out books, likewise")
    parser.add_argument(
        "--reading", type=existing, help="folder of factbook, squad_train, squad_dev (.jsonl.gz): their questions join every step"
    )
    parser.add_argument(
        "--key-value-tokens", type=int, default=0, help="of key-value text in every step, for bases pretrained with it"
    )
    parser.add_argument("--digits", type=int, default=4, help="of a number in key-value text")
    parser.add_argument("--devices", default="0", help="GPUs, with commas; one named twice has two processes")
    parser.add_argument("--at-once", type=int, default=4, help="runs of a process that share its device")
    parser.add_argument("--minutes", type=float, default=1e6, help="time limit of the whole command")
    parser.add_argument("--step-seconds", type=float, default=0.06, help="guess of a step's wall-clock until a run has ended")
    parser.add_argument(
        "--base-steps", type=int, help="steps that a base has behind it, for arms from scratch; by default its preset's"
    )
    parser.add_argument("--backend", default="chunked", help="kernels")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV, to which lines are appended")
    parser.add_argument("--work", type=Path, help="folder for expanded checkpoints; by default a temporary one")
    parser.add_argument("--dry-run", action="store_true", help="a few steps of everything on a CPU; nothing is kept")
    for hidden, kind in (("--worker", str), ("--claims", Path), ("--deadline", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command is None and not (args.table or args.dry_run):
        parser.error("name a command, or --table")
    if args.key_value_tokens < 0 or args.digits < 1:
        parser.error("--key-value-tokens is at least 0, --digits at least 1")
    return args


def main() -> None:
    args = parse()
    if args.command is None and args.table:
        wanted = {"base": args.base, "steps": [str(length) for length in args.steps or []]}
        found = [line for line in lines(args.results) if all(not named or line[key] in named for key, named in wanted.items())]
        if not found:
            raise SystemExit(f"{args.results} holds no such runs")
        table(found)
        if args.arms:
            draw(found, args.arms.split(","), args.figure)
        return
    disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    deadline = args.deadline or time.time() + 60 * args.minutes
    command, on_gpu = args.command or "screen", torch.cuda.is_available() and not args.dry_run
    with tempfile.TemporaryDirectory() as scratch:
        folder, results = Path(scratch), args.results
        work_folder = args.work or folder
        sizes: dict[str, Any] = {}
        if args.dry_run:
            results, args.steps, args.at_once = folder / "dry.csv", [2], 2
            sizes = dict(DRY)
        bases = random_bases(folder) if args.dry_run and not args.base else named_bases(args.base)
        seeds, steps = (given or default for given, default in zip((args.seeds, args.steps), DEFAULTS[command], strict=True))
        specs = work_list(bases, [part for part in args.arms.split(",") if part], seeds, steps, args.batch)
        kind = COST if command == COST else RUN
        if kind == COST:
            args.at_once = 1
        left = missing(specs, results, kind)
        if args.worker is None:
            print(f"{len(left)} of {len(specs)} runs to do", flush=True)
            if on_gpu:
                work_on_devices(args.devices.split(","), deadline)
                return
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        place = Place(
            device, work_folder, bases, args.data, args.test, args.backend, at_once=args.at_once, deadline=deadline, **sizes
        )
        if args.reading:
            few = {"train": 16, "test": 4} if args.dry_run else {}
            place.reading = ReadingRows(args.reading, READING_WIDTH, device, seed=0, **few)
        place.oracles = dict(named_folders("--oracle", args.oracle))
        place.key_value_tokens, place.digits = args.key_value_tokens, args.digits
        place.eager, place.base_steps = args.eager, args.base_steps or place.base_steps
        claims = args.claims or folder / "claims"
        claims.mkdir(exist_ok=True)
        _ = place.mixture, place.held_out, place.needles  # read by the default stream, before any other is there
        if on_gpu:
            torch.cuda.synchronize()
            torch.set_num_threads(2)  # for surgery; many processes share the cores
        gc.collect()
        gc.freeze()  # a capture collects garbage, and need not look through all libraries for it
        work(place, kind, Queue(left, claims, args.worker or "0", deadline, args.step_seconds, place.steps), results)
        if args.dry_run:
            table(lines(results))


if __name__ == "__main__":
    main()
