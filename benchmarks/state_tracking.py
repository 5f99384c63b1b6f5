"""Can a recurrent model count? Parity beyond the training length, with eigenvalues in [0, 1] and in [-1, 1] (arXiv 2411.12537).

    python benchmarks/state_tracking.py screen      # one seed, fewer steps, three learning rates a model
    python benchmarks/state_tracking.py confirm     # more seeds at the learning rate that the screen found best
    python benchmarks/state_tracking.py surgery     # trained on text with [0, 1], extended by statex, fine-tuned on text and parity
    python benchmarks/state_tracking.py table       # summary of the CSV, and a figure for each problem

Models are trained from nothing on words of up to 40 symbols, the answer after each symbol predicted, and read 256. Each run is a
line of the CSV, and runs that have theirs are skipped, so every command resumes. `--dry-run` runs a few steps of everything on a
CPU in seconds, and keeps nothing.

Recipes (`tracking_runs.RECIPES`, the CSV's column `recipe`): `line` was the first, and not every seed of it read 256 symbols. Two
things were off. A short convolution makes what a step writes depend on the three symbols before; these differences add up in a
state that never forgets. And once the loss on 40 symbols is nearly 0, nothing pulls an eigenvalue the rest of the way to -1 or 1.
`steady` holds the convolutions to the current symbol (not after surgery, where text needs them), smooths the answers, lets the
learning rate fall to 0, and measures the last weights, whatever the looks along the run said.

What theory expects: with eigenvalues in [0, 1] nothing beyond the trained length. With [-1, 1] one layer solves parity, but
counting to more than two takes matrices that are not triangular, so that Mamba, Mamba-2 and GLA, whose matrices are diagonal,
cannot add modulo 5 (arXiv 2411.12537). A token of DeltaNet reflects once, and two layers of that solve the words of dihedral
groups (arXiv 2502.10297): S3 is one, and addition modulo 5 is part of one. For A5, which is not solvable, nothing of the kind is
known.

`surgery` asks this project's own question: does a model that was trained with [0, 1] learn to count in a short fine-tuning run once
its spectrum is extended, and does its text loss suffer? Beside it, the same fine-tuning without surgery.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from side_by_side import run_side_by_side
from tracking_runs import (
    BELOW_ZERO,
    FIRST,
    GROUPS,
    LENGTHS,
    NO_SURGERY,
    OUTCOMES,
    RECIPES,
    SHAPES,
    Place,
    Spec,
    fine_tuned,
    from_nothing,
    text_base,
)
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("layers", "hidden", "batch")
"""Fields of a bench that tell models of one size from those of another; a learning rate is chosen for one size."""
IDENTITY = tuple(field.name for field in fields(Spec))
ARMS = ("[0, 1]", BELOW_ZERO)
INITS = ("preserve", "inherit")
DRAWN = (*ARMS, NO_SURGERY, *INITS)
"""In this order, each in its colour."""
RATES = (1e-3, 3e-3, 1e-2)
TEXT_FAMILIES = ("mamba", "delta_net")
SEEDS = (4, 5, 6)
"""Of `confirm` and `surgery`. Seeds below went into finding the curriculum, the screen's among them."""
STEPS = {"screen": 800, "confirm": 2000, "base": 1200, "surgery": 800}
TEXT_RATE, TUNING_RATE = 3e-3, 3e-3

Train = Callable[[Place, Spec], Generator[None, None, dict[str, Any]]]


@dataclass(frozen=True)
class Bench:
    """What a command works with."""

    place: Place
    results: Path
    problem: str
    at_once: int
    layers: int
    hidden: int
    batch: int
    scale: float
    """Of the number of steps."""
    families: tuple[str, ...] = tuple(SHAPES)
    arms: tuple[str, ...] = ARMS
    """Of the models that are trained from nothing."""
    recipe: str = "steady"
    seeds: tuple[int, ...] = SEEDS

    def spec(self, stage: str, family: str, arm: str, seed: int, rate: float) -> Spec:
        """A run of this bench's sizes."""
        steps = max(5, round(STEPS[stage] * self.scale))
        return Spec(stage, self.problem, family, arm, seed, rate, steps, self.layers, self.hidden, self.batch, self.recipe)

    def lines(self) -> list[dict[str, str]]:
        """The CSV as it is."""
        if not self.results.exists():
            return []
        with self.results.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def run(self, specs: Iterable[Spec], train: Train) -> None:
        """Run what the CSV does not hold yet, and append a line for each run as it ends."""
        specs, known = list(specs), {tuple(line[name] for name in IDENTITY) for line in self.lines()}
        missing = [spec for spec in specs if tuple(map(str, asdict(spec).values())) not in known]
        print(f"{len(missing)} of {len(specs)} runs to do", flush=True)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        for line in run_side_by_side((partial(train, self.place, spec) for spec in missing), self.place.device, self.at_once):
            new = not self.results.exists()
            with self.results.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, (*IDENTITY, *OUTCOMES), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(line)
            print(json.dumps({name: value for name, value in line.items() if value != ""}), flush=True)


def screen(bench: Bench) -> None:
    """Every family and range of eigenvalues at three learning rates, one seed."""
    bench.run((bench.spec("screen", *model, 0, rate) for model in models(bench) for rate in RATES), from_nothing)


def confirm(bench: Bench) -> None:
    """Each at the learning rate that did best in the screen, on seeds that nothing was tuned on."""
    rates = best_rates(bench)
    specs = (bench.spec("confirm", *model, seed, rates.get(model, RATES[1])) for model in models(bench) for seed in bench.seeds)
    bench.run(specs, from_nothing)


def surgery(bench: Bench) -> None:
    """Text models with [0, 1], then the same fine-tuning after surgery and after none; a family after the other."""
    for family in (family for family in TEXT_FAMILIES if family in bench.families):
        bases = [bench.spec("base", family, ARMS[0], seed, TEXT_RATE) for seed in bench.seeds]
        bench.run(bases, text_base)
        for base in bases:
            if not bench.place.base(base).exists():
                raise SystemExit(f"the CSV has the base model {bench.place.base(base)}, which is gone: give its --work folder")
        arms = (NO_SURGERY, *INITS)
        bench.run((bench.spec("surgery", family, arm, seed, TUNING_RATE) for seed in bench.seeds for arm in arms), fine_tuned)


def models(bench: Bench) -> list[tuple[str, str]]:
    """(family, arm) of all models that are trained from nothing."""
    return [(family, arm) for family in bench.families for arm in bench.arms]


def best_rates(bench: Bench) -> dict[tuple[str, str], float]:
    """By (family, arm), the learning rate of the screen that was right most often at the greatest length; of equals, the sooner.

    Where the recipe was not screened, the rate of the first one, which was.
    """

    def merit(line: dict[str, str]) -> tuple[float, float]:
        return float(line[f"accuracy_{LENGTHS[-1]}"]), -float(line["solved_at"] or line["steps"])

    rates: dict[tuple[str, str], float] = {}
    for recipe in (FIRST, bench.recipe):
        best: dict[tuple[str, str], dict[str, str]] = {}
        screened = {"stage": "screen", "problem": bench.problem, "recipe": recipe}
        screened |= {name: str(getattr(bench, name)) for name in SIZES}
        for line in bench.lines():
            key = line["family"], line["arm"]
            if screened.items() <= line.items() and (key not in best or merit(line) > merit(best[key])):
                best[key] = line
        rates |= {key: float(line["learning_rate"]) for key, line in best.items()}
    return rates


def table(bench: Bench) -> None:
    """For each problem a row for each kind of model of the stages `confirm`, `base` and `surgery`, and a figure."""
    by_problem: dict[str, dict[tuple[str, str, str], list[dict[str, str]]]] = {}
    for line in bench.lines():
        if line["stage"] != "screen":
            panel = f"{line['layers']} × {line['hidden']}, {line['steps']} steps, {line['recipe']}"
            key = line["stage"], f"{line['family']}, {panel}", line["arm"]
            by_problem.setdefault(line["problem"], {}).setdefault(key, []).append(line)
    for problem, groups in by_problem.items():
        print(f"\n{problem}\n")
        summary(groups)
        picked = {key: lines for key, lines in groups.items() if key[0] in ("confirm", "surgery")}
        suffix = "" if problem == "parity" else f"-{problem}"
        draw(picked, bench.results.with_name(f"{bench.results.stem}{suffix}.png"))


def summary(groups: dict[tuple[str, str, str], list[dict[str, str]]]) -> None:
    """A row for each kind of model; means over seeds, the worst and the best in brackets."""
    names = [f"{length} symbols" for length in LENGTHS]
    print(f"| stage | model | eigenvalues, surgery | seeds | {' | '.join(names)} | solved at step | bits/byte |")
    print("|---|---|---|---|" + "---|" * (len(names) + 2))
    for (stage, family, arm), lines in groups.items():
        shares = [spread([100 * float(line[f"accuracy_{length}"]) for line in lines], ".1f") for length in LENGTHS]
        solved = spread([float(line["solved_at"]) for line in lines if line["solved_at"]], ".0f")
        bits = " → ".join(
            spread([float(line[name]) for line in lines], ".3f") for name in ("bits_before", "bits_after") if lines[0][name]
        )
        print(f"| {stage} | {family} | {arm} | {len(lines)} | {' | '.join(shares)} | {solved} | {bits} |")


def spread(values: list[float], form: str) -> str:
    """`mean [least, greatest]`, or nothing."""
    if not values:
        return ""
    return f"{statistics.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def draw(groups: dict[tuple[str, str, str], list[dict[str, str]]], path: Path) -> None:
    """Accuracy by length, a panel for each stage and model, a line for each seed."""
    panels = list(dict.fromkeys(key[:2] for key in groups))
    if not panels:
        return
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2.6 * columns, 3 * rows), sharey=True, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (stage, model) in zip(grid.flat, panels, strict=False):
        arms = sorted((key for key in groups if key[:2] == (stage, model)), key=lambda key: DRAWN.index(key[2]))
        for key in arms:
            for number, line in enumerate(groups[key]):
                shares = [float(line[f"accuracy_{length}"]) for length in LENGTHS]
                axis.plot(LENGTHS, shares, "o-", color=f"C{DRAWN.index(key[2])}", alpha=0.7, label=None if number else key[2])
        axis.set_title(f"{stage}: {model}".replace(", ", "\n", 1), fontsize=9)
        axis.set(xlabel="symbols", xscale="log", ylim=(0, 1.03))
        axis.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axes in grid:
        axes[0].set_ylabel("right answers")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


COMMANDS = {"screen": screen, "confirm": confirm, "surgery": surgery, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=[*COMMANDS])
    parser.add_argument("--problem", choices=[*GROUPS], default="parity")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/state_tracking-h100.csv, or -cpu.csv on a CPU")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "state_tracking", help="folder of the text models")
    parser.add_argument("--at-once", type=int, default=8, help="runs that share the device")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--families", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--recipe", choices=[*RECIPES], default="steady", help="how models are trained; `line` made the first rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS], help="of confirm and surgery")
    parser.add_argument("--below-zero-only", action="store_true", help="of models from nothing those with [-1, 1] only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="a few steps of everything on a CPU; nothing is kept")
    args = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        if args.dry_run:
            small = {"layers": 1, "hidden": 16, "batch": 4, "scale": 0.0, "device": "cpu", "at_once": 2}
            vars(args).update(small, results=Path(scratch) / "dry.csv", work=Path(scratch))
        device = torch.device(args.device)
        machine = "h100" if device.type == "cuda" else "cpu"
        results = args.results or ROOT / "benchmarks" / "results" / f"state_tracking-{machine}.csv"
        sizes = {"width": 32, "text_windows": 4, "words": 8} if args.dry_run else {"width": 256, "text_windows": 512, "words": 4096}
        place = Place(device, args.work, **sizes)
        bench = Bench(place, results, args.problem, args.at_once, args.layers, args.hidden, args.batch, args.scale)
        bench = replace(bench, families=tuple(args.families), arms=ARMS[1:] if args.below_zero_only else ARMS)
        bench = replace(bench, recipe=args.recipe, seeds=tuple(args.seeds))
        for command in args.commands:
            COMMANDS[command](bench)


if __name__ == "__main__":
    main()
