"""What limits the recall of the small checkpoints: MQAR accuracy of each beside the same training with a key dimension ×4.

    python benchmarks/state_limit.py                                  # draw the committed numbers
    python benchmarks/state_limit.py runs/gla runs/gla-x4 ...         # collect the curves that examples/pretrain_tiny.py left

Prints a table and writes `benchmarks/results/state_limit-h100.csv` (only when runs are given) and `docs/images/state_limit.png`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "state_limit-h100.csv"
FIGURE = ROOT / "docs" / "images" / "state_limit.png"
COLUMNS = ("run", "step", "tokens", "bits_per_byte", "num_pairs", "accuracy", "rows", "device")
ROWS = 256


def collect(runs: list[Path]) -> None:
    """Every evaluation in the runs' `curve.json`, one line per number of pairs."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for run in runs:
            for record in json.loads((run / "curve.json").read_text()):
                for num_pairs, accuracy in record.get("mqar", {}).items():
                    writer.writerow(
                        [
                            run.name,
                            record["step"],
                            record["tokens"],
                            record["bits_per_byte"],
                            num_pairs,
                            accuracy,
                            ROWS,
                            record["device"],
                        ]
                    )


def final_accuracy() -> dict[str, dict[int, float]]:
    """Accuracy by number of pairs at the last step of each run."""
    found: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["run"]][int(row["step"])][int(row["num_pairs"])] = float(row["accuracy"])
    return {run: steps[max(steps)] for run, steps in found.items()}


def draw(accuracy: dict[str, dict[int, float]]) -> None:
    """One panel a model: the checkpoint, and the same training with four times the state."""
    bases = [run for run in accuracy if f"{run}-x4" in accuracy]
    figure, axes = plt.subplots(1, len(bases), figsize=(4 * len(bases), 3.2), sharey=True, squeeze=False)
    for axis, base in zip(axes[0], bases, strict=True):
        for run, style, label in ((base, "o-", "checkpoint"), (f"{base}-x4", "s--", "same training, state ×4")):
            axis.plot(list(accuracy[run]), list(accuracy[run].values()), style, label=label)
        axis.set(title=base, xlabel="key-value pairs", xscale="log", ylim=(0, 1.03))
        axis.set_xticks(ticks := [2, 4, 8, 16, 32, 64, 128], [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("values recalled")
    axes[0][0].legend(loc="lower left")
    figure.tight_layout()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    if runs := [Path(argument) for argument in sys.argv[1:]]:
        collect(runs)
    accuracy = final_accuracy()
    counts = sorted({count for by_count in accuracy.values() for count in by_count})
    print(f"{'run':<16}" + "".join(f"{count:>8}" for count in counts))
    for run, by_count in accuracy.items():
        print(f"{run:<16}" + "".join(f"{100 * by_count[count]:>8.1f}" if count in by_count else " " * 8 for count in counts))
    draw(accuracy)


if __name__ == "__main__":
    main()
