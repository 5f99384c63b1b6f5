"""The numbers of `recovery.py`'s CSV as Markdown, a table for each base and length of runs, and as curves along the runs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from recovery_measures import COST, KEY_VALUE, MORE_TEXT, MQAR, TEXT

RUN, ERROR = "run", "error"
FLOOR, LIMIT = "baseline", 0.5
"""The axis of runs without surgery, and the percent by which an arm's bits per byte may lie above the best of them."""
SHOWN = tuple((MQAR, f"{kind}_{n}") for kind, counts in (("accuracy", (16, 32, 64, 128)), ("capacity", (50, 90))) for n in counts)
LOOKED_UP = tuple((KEY_VALUE, metric) for metric in ("exact_4", "exact_8", "exact_16", "exact_32", "capacity_50", "capacity_90"))
READ = (("factbook", "exact"), ("squad", "exact"))
"""The first were not always measured; these are of runs with `--reading`."""
COSTS = ("train_ms", "decode_ms_batch_1")
MARKERS = "os^vDPX*"
DRAWN = {"bits per byte": (TEXT, "bits_per_byte"), "recall of 128 pairs": (MQAR, "accuracy_128")}
DRAWN_IF_LEARNT = {"key values of 16": (KEY_VALUE, "exact_16")}
Setting = tuple[str, str, str]
"""(base, steps, batch)."""
Run = dict[tuple[str, str], float]
"""Last values of one run by task and metric."""
Line = dict[str, str]


def ended(lines: Iterable[Line]) -> dict[Setting, dict[str, dict[str, list[Line]]]]:
    """Lines of the runs that ended, by setting, arm and seed."""
    lines = list(lines)
    done = {key(line) for line in lines if line["task"] == RUN}
    found: dict[Setting, dict[str, dict[str, list[Line]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        if key(line) in done and line["task"] not in (ERROR, COST):
            found[line["base"], line["steps"], line["batch"]][line["arm"]][line["seed"]].append(line)
    return found


def key(line: Line) -> tuple[str, ...]:
    """What makes a run."""
    return tuple(line[name] for name in ("base", "steps", "batch", "arm", "seed"))


def table(lines: Iterable[Line]) -> None:
    """A row for each arm, means over seeds, the best recall of 64 pairs first; a star where text stays within the limit.

    Text is compared with that of the best run without surgery on the same seeds: their data differ, and the text with them.
    """
    lines = list(lines)
    costs = {(line["base"], line["arm"], line["metric"]): float(line["value"]) for line in lines if line["task"] == COST}
    for (base, steps, batch), arms in ended(lines).items():
        by_seed = {arm: {seed: final(run) for seed, run in runs.items()} for arm, runs in arms.items()}
        last = {arm: list(runs.values()) for arm, runs in by_seed.items()}
        first = {arm: next(iter(runs.values()))[0] for arm, runs in arms.items()}
        floors = [by_seed[arm] for arm in arms if first[arm]["axis"] == FLOOR]
        print(f"\n{base}, {steps} steps of {batch} times the base's tokens\n")
        shown = (*SHOWN, *(part for part in (*LOOKED_UP, *READ) if any(part in run for runs in last.values() for run in runs)))
        names = ["arm", "state", "seeds", "bits/byte", "over best lpt", *map(title, shown), *COSTS]
        print(f"| {' | '.join(names)} |")
        print("|---|" + "---:|" * (len(names) - 1))
        for arm in sorted(arms, key=lambda arm: -mean(last[arm], MQAR, "accuracy_64")):
            bits = mean(last[arm], MORE_TEXT, "bits_per_byte")
            over = 100 * (bits / best_text(floors, by_seed[arm]) - 1)
            star = " *" if over <= LIMIT else ""
            cells = [f"×{float(first[arm]['factor']):g}", str(len(last[arm])), f"{bits:.4f}", f"{over:+.2f} %{star}"]
            cells += [form(metric, [run[task, metric] for run in last[arm] if (task, metric) in run]) for task, metric in shown]
            cells += [f"{costs[base, arm, name]:.2f}" if (base, arm, name) in costs else "" for name in COSTS]
            print(f"| {arm} | {' | '.join(cells)} |")
    done = {key(line) for line in lines if line["task"] == RUN}
    for line in (line for line in lines if line["task"] == ERROR and key(line) not in done):
        print(f"\nfailed: {line['base']} {line['arm']} seed {line['seed']}: {line['metric']}")


def final(run: list[Line]) -> Run:
    """Last values; a run's lines are in the order of its steps."""
    return {(line["task"], line["metric"]): float(line["value"]) for line in run}


def best_text(floors: list[dict[str, Run]], seeds: Iterable[str]) -> float:
    """Bits per byte of the best of the runs without surgery, a mean over the given seeds; NaN where none has them all."""
    seeds = set(seeds)
    told = [[runs[seed][MORE_TEXT, "bits_per_byte"] for seed in seeds] for runs in floors if seeds <= set(runs)]
    return min((statistics.mean(values) for values in told), default=math.nan)


def mean(runs: list[Run], task: str, metric: str) -> float:
    """Over seeds; -1 where none has the metric."""
    values = [run[task, metric] for run in runs if (task, metric) in run]
    return statistics.mean(values) if values else -1.0


def title(shown: tuple[str, str]) -> str:
    """Of a column."""
    task, metric = shown
    return metric if task == MQAR else f"{task} {metric}"


def form(metric: str, values: list[float]) -> str:
    """A mean, with least and greatest in brackets where there are several."""
    if not values:
        return ""
    factor = 1 if metric.startswith("capacity") else 100
    told = [
        "more" if math.isinf(value) else f"{factor * value:.1f}" for value in (statistics.mean(values), min(values), max(values))
    ]
    return told[0] if len(values) == 1 else f"{told[0]} [{told[1]}, {told[2]}]"


def draw(lines: Iterable[Line], arms: list[str], path: Path) -> None:
    """Text and recall along the runs, a row for each base and length, a line for each of the arms; means over seeds."""
    chosen = {setting: {arm: found[arm] for arm in arms if arm in found} for setting, found in ended(lines).items()}
    chosen = {setting: found for setting, found in chosen.items() if found}
    if not chosen:
        raise SystemExit("the CSV holds none of these arms")
    told = [line for found in chosen.values() for runs in found.values() for run in runs.values() for line in run]
    learnt = {(line["task"], line["metric"]) for line in told if float(line["value"]) > 0}
    drawn = DRAWN | {label: metric for label, metric in DRAWN_IF_LEARNT.items() if metric in learnt}
    figure, axes = plt.subplots(len(chosen), len(drawn), figsize=(4.5 * len(drawn), 3.2 * len(chosen)), squeeze=False)
    for row, ((base, steps, _), found) in zip(axes, chosen.items(), strict=True):
        for axis, (label, metric) in zip(row, drawn.items(), strict=True):
            for arm, runs in found.items():
                points: dict[str, list[tuple[float, float]]] = defaultdict(list)
                for line in (line for run in runs.values() for line in run):
                    if (line["task"], line["metric"]) == metric:
                        points[line["step"]].append((int(line["tokens"]) / 1e6, float(line["value"])))
                curve = [[statistics.mean(part) for part in zip(*seeds, strict=True)] for seeds in points.values()]
                if len(curve) == 1:  # an oracle, which was trained elsewhere
                    axis.axhline(curve[0][1], label=arm, color=f"C{arms.index(arm)}", linestyle=":")
                    continue
                marker = MARKERS[arms.index(arm) % len(MARKERS)]
                axis.plot([x for x, _ in curve], [y for _, y in curve], f"{marker}-", label=arm, color=f"C{arms.index(arm)}")
            axis.set(title=f"{base}, {steps} steps", xlabel="million tokens", ylabel=label)
            axis.grid(alpha=0.3)
        starts = [float(line["value"]) for runs in found.values() for run in runs.values() for line in run[:1]]
        row[0].set_ylim(0.98 * min(starts), 1.06 * min(starts))  # what is drawn afresh starts far above
        row[1].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")
