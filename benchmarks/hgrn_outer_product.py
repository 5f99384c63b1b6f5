"""Recall from nothing: an HGRN whose vector state cannot hold key-value pairs gets HGRN2's matrices by surgery (outer_product).

    python benchmarks/hgrn_outer_product.py --data books_train.jsonl.gz --test books_test.jsonl.gz
    python benchmarks/hgrn_outer_product.py --table           # the committed numbers again, as a table and a figure

A byte-level HGRN is trained on the mixture of `examples/pretrain_tiny.py` (books, needles, MQAR). Then the same fine-tuning is
given to it as it is (`continued`), and to what `statex.expand` makes of it: `preserve`, which keeps its function and adds a number
a channel, λ, with which it reads the rest of the matrix; `preserve, opened`, the same with λ led to where that reading counts in
full; and `inherit`, which makes an HGRN2 of its weights. Beside them HGRN2s are trained from scratch on as many tokens as base and
fine-tuning together have seen.

`--start stock` begins as the families do, and there nothing learns to recall, not even HGRN2s from scratch: a key is 1 - f, so with
fresh gates the keys of all tokens are nearly alike and of one sign, and writing to a channel is forgetting it. `--start long`, the
default, gives the gates a memory (`hgrn_runs.new_model`). What was found is told in docs/surgery.md.

Each run is a process of its own, several side by side on one GPU, and ends as a line of the CSV; runs that have theirs are skipped,
so the command resumes. `--dry-run` takes a few steps of everything on a CPU in seconds and keeps nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from hgrn_runs import BASE, CONTINUED, INHERIT, OPENED, PAIRS, PRESERVE, ROOT, SCRATCH, Place, Spec, train

import statex

RESULTS = ROOT / "benchmarks" / "results" / "hgrn_outer_product-h100.csv"
FIGURE = ROOT / "docs" / "images" / "hgrn_outer_product.png"
LABELS = {name: name for name in (BASE, CONTINUED, PRESERVE, OPENED, INHERIT, SCRATCH)}
LABELS |= {BASE: "HGRN", CONTINUED: "HGRN, trained on"}
SIZES = ("start", "hidden", "layers", "base_steps", "tune_steps", "tune_rate", "text_rows", "mqar_tokens")
"""Columns that tell runs of one kind and size from those of another; only runs of one are comparable."""
STARTS = {"stock": "gates with lower bounds", "long": "gates that remember"}
"""How new models begin."""


def specs(args: argparse.Namespace) -> list[Spec]:
    """All runs, those that answer most first, each behind the one that it starts from."""
    sizes = {name: getattr(args, name) for name in SIZES}
    first, *others = args.factors
    arms = [(BASE, 1), (SCRATCH, first), (CONTINUED, 1), (PRESERVE, first), (OPENED, first), (INHERIT, first)]
    arms += [(arm, factor) for factor in others for arm in (SCRATCH, OPENED, INHERIT, PRESERVE)]
    return [Spec(arm, factor, seed, **sizes) for seed in range(args.seeds) for arm, factor in arms]


def lines(results: Path) -> list[dict[str, str]]:
    """The CSV as it is."""
    if not results.exists():
        return []
    with results.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(results: Path, line: dict[str, Any]) -> None:
    """One more line."""
    results.parent.mkdir(parents=True, exist_ok=True)
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)
    print(json.dumps(line), flush=True)


def identity(line: Spec | dict[str, str]) -> tuple[str, ...]:
    """What makes a run the same run."""
    values = asdict(line) if isinstance(line, Spec) else line
    return tuple(str(values[name]) for name in Spec.__dataclass_fields__)


def missing(wanted: Iterable[Spec], results: Path, work: Path) -> list[Spec]:
    """Runs that the CSV does not hold; a base model that others need and that is gone is made again."""
    known = {identity(line) for line in lines(results)}
    open_runs = [spec for spec in wanted if identity(spec) not in known]
    bases = dict.fromkeys(spec.base for spec in open_runs if spec.base is not None)
    return [*(base for base in bases if base not in open_runs and not (work / base.name).exists()), *open_runs]


def run_all(wanted: list[Spec], place: Place, results: Path, jobs: int) -> None:
    """Run what is missing, `jobs` processes at a time (0: here, one after another); a run waits for the model it starts from."""
    waiting, done = missing(wanted, results, place.work), {identity(line) for line in lines(results)}
    print(f"{len(waiting)} of {len(wanted)} runs to do", flush=True)
    place.work.mkdir(parents=True, exist_ok=True)
    if jobs == 0:
        for spec in waiting:
            line = train(spec, place)
            if identity(spec) not in done:  # a base made again has its line already
                append(results, line)
        return
    active: list[tuple[Spec, subprocess.Popen[str]]] = []
    failed: list[Spec] = []
    while waiting or active:
        waiting = [spec for spec in waiting if spec.base not in failed]
        for spec in list(waiting):
            base_is_done = spec.base not in waiting and all(spec.base != other for other, _ in active)
            if base_is_done and len(active) < jobs:
                waiting.remove(spec)
                order = json.dumps({"spec": asdict(spec), "place": asdict(place)}, default=str)
                command = [sys.executable, __file__, "--one", order]
                active.append((spec, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        for spec, process in list(active):
            if process.poll() is not None:
                active.remove((spec, process))
                told = process.stdout.read().splitlines() if process.stdout else []
                if process.returncode != 0:
                    failed.append(spec)
                elif identity(spec) not in done:
                    append(results, json.loads(told[-1]))
        time.sleep(0.2)
    if failed:
        names = ", ".join(spec.name for spec in failed)
        raise SystemExit(f"failed, with what starts from them: {names}; the other runs are in {results}")


def one(order: str) -> None:
    """Carry out one run for the process that drives all; its line is the last thing printed."""
    told = json.loads(order)
    paths = {name: Path(told["place"][name]) for name in ("data", "test", "work")}
    print(json.dumps(train(Spec(**told["spec"]), Place(**told["place"] | paths))), flush=True)


Group = dict[tuple[str, int], list[dict[str, str]]]
"""Lines of the CSV by arm and factor: the seeds of one kind of run."""


def table(results: Path, figure: Path) -> None:
    """For each size of runs a Markdown table, a row for each kind of run, means over seeds; and recall by number of pairs."""
    by_sizes: dict[tuple[str, ...], Group] = {}
    for line in lines(results):
        group = by_sizes.setdefault(tuple(line[name] for name in SIZES), {})
        group.setdefault((line["arm"], int(line["factor"])), []).append(line)
    if not by_sizes:
        return
    for sizes, group in by_sizes.items():
        by_sizes[sizes] = group = dict(sorted(group.items(), key=lambda kind: (list(LABELS).index(kind[0][0]), kind[0][1])))
        columns = [pairs for pairs in pairs_of(group) if pairs in (2, 4, 8, 16, 32, 64, 128)]
        print(f"\n{title(sizes)}\n")
        print(f"| model | state | seeds | tokens | bits/byte | {' | '.join(f'{pairs} pairs' for pairs in columns)} |")
        print("|---|---:|---:|---:|---:|" + "---:|" * len(columns))
        for (arm, factor), runs in group.items():
            times = "" if factor == 1 else f" ×{factor}"
            recall = " | ".join(f"{100 * mean(runs, f'recall_{pairs}'):.1f}" for pairs in columns)
            state, tokens = int(runs[0]["state_elements"]), int(runs[0]["tokens"])
            bits = mean(runs, "bits_per_byte")
            print(f"| {LABELS[arm]}{times} | {state:,} | {len(runs)} | {tokens / 1e6:.0f} M | {bits:.4f} | {recall} |")
    draw(by_sizes, figure)


def title(sizes: tuple[str, ...]) -> str:
    """The sizes of runs in words."""
    told = dict(zip(SIZES, sizes, strict=True))
    return (
        f"{STARTS[told['start']]}: {told['layers']} layers of {told['hidden']}, {told['base_steps']} + {told['tune_steps']} steps, "
        f"these at a rate of {told['tune_rate']}, each {told['text_rows']} windows of text and {told['mqar_tokens']} tokens of MQAR"
    )


def pairs_of(group: Group) -> list[int]:
    """Numbers of pairs that runs were asked for."""
    return [pairs for pairs in PAIRS if f"recall_{pairs}" in next(iter(group.values()))[0]]


def mean(runs: list[dict[str, str]], column: str) -> float:
    """Mean over seeds."""
    return sum(float(line[column]) for line in runs) / len(runs)


def draw(by_sizes: dict[tuple[str, ...], Group], path: Path) -> None:
    """Recall by number of pairs, a row of panels for each size of runs: the HGRN and what comes of it; HGRN2s from scratch."""
    panels = {
        "outer_product, preserve": (BASE, CONTINUED, PRESERVE, OPENED),
        "outer_product, inherit": (BASE, CONTINUED, INHERIT),
        "HGRN2 from scratch": (SCRATCH,),
    }
    styles = {BASE: "k:", CONTINUED: "k--", OPENED: "^--", INHERIT: "s-."}
    factors = sorted({factor for group in by_sizes.values() for _, factor in group if factor > 1})
    figure, rows = plt.subplots(len(by_sizes), len(panels), figsize=(12.5, 3.4 * len(by_sizes)), sharey=True, squeeze=False)
    for axes, (sizes, group) in zip(rows, by_sizes.items(), strict=True):
        pairs = pairs_of(group)
        for axis, (name, arms) in zip(axes, panels.items(), strict=True):
            for arm, factor in (kind for kind in group if kind[0] in arms):
                recall = [mean(group[arm, factor], f"recall_{n}") for n in pairs]
                color = {} if factor == 1 else {"color": f"C{factors.index(factor)}"}
                axis.plot(pairs, recall, styles.get(arm, "o-"), label=LABELS[arm] + ("" if factor == 1 else f" ×{factor}"), **color)
            budget = max(int(line["tokens"]) for runs in group.values() for line in runs) / 1e6
            axis.set_title(f"{name}\n{STARTS[sizes[0]]}, {budget:.0f} M tokens", fontsize=9)
            axis.set(xlabel="key-value pairs", xscale="log", ylim=(0, 1.03))
            axis.set_xticks(ticks := [n for n in pairs if n in (2, 4, 8, 16, 32, 64, 128)], [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6, framealpha=0.5)
        axes[0].set_ylabel("values recalled")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    books = Path(statex.__file__).parent / "assets"
    parser.add_argument("--data", type=Path, default=books / "books_train.jsonl.gz", help="books to train on, with a field `text`")
    parser.add_argument("--test", type=Path, default=books / "books_test.jsonl.gz", help="held-out books, likewise")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "hgrn_outer_product", help="folder of the checkpoints")
    parser.add_argument("--jobs", type=int, default=6, help="processes that share the GPU; 0: one run after another, in this one")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--start", choices=STARTS, default="long", help="; ".join(f"{name}: {what}" for name, what in STARTS.items())
    )
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 16, 32, 128], help="of outer_product, the first one first")
    for name, value in (("hidden", 128), ("layers", 2), ("base-steps", 800), ("tune-steps", 1800), ("text-rows", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mqar-tokens", type=int, default=16_384, help="tokens of MQAR rows in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, of what is trained from nothing")
    parser.add_argument("--tune-rate", type=float, default=3e-3, help="peak, of fine-tuning")
    parser.add_argument("--no-compile", action="store_true", help="CUDA graphs alone: slower steps, no minute of compilation")
    parser.add_argument("--table", action="store_true", help="print and draw what the CSV holds, and train nothing")
    parser.add_argument("--dry-run", action="store_true", help="a few steps of everything on a CPU; nothing is kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one)
        return
    if args.table:
        if not lines(args.results):
            parser.error(f"{args.results} holds no runs")
    else:
        for option, path in (("--data", args.data), ("--test", args.test)):
            if not path.is_file():
                parser.error(f"argument {option}: {path} does not exist")
        if not (args.dry_run or torch.cuda.is_available()) and args.results == RESULTS:
            parser.error(f"no CUDA device: {RESULTS.name} holds a GPU's runs; give --dry-run, or --results with another file")
    with tempfile.TemporaryDirectory() as scratch:
        window, warmup, test_bytes = 512, 100, None
        if args.dry_run:
            small = {"layers": 1, "base_steps": 2, "tune_steps": 1, "text_rows": 8, "mqar_tokens": 512, "jobs": 0}
            vars(args).update(small, results=Path(scratch) / "dry.csv", figure=Path(scratch) / "dry.png", work=Path(scratch))
            window, warmup, test_bytes = 512, 1, 2048
        place = Place(args.data, args.test, args.work, window, args.learning_rate, warmup, test_bytes, not args.no_compile)
        if not args.table:
            run_all(specs(args), place, args.results, args.jobs)
        table(args.results, args.figure)


if __name__ == "__main__":
    main()
