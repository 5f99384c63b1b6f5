"""Do layers that recall attribution names gain more than the others? The checkpoint of the quickstart, lifted in either.

    python benchmarks/auto_layers.py     # two runs of the quickstart's recipe on a CPU; goes on where it stopped

Prints the comparison and writes `benchmarks/results/auto_layers-cpu.csv`. Where attribution names half of the layers, both plans
add the same state and the same new numbers.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from rich.console import Console

from statex.evals import compare, diagnose, evaluate, load_result
from statex.evals.result import EvalResult
from statex.quickstart import CHECKPOINT, TRAIN
from statex.recipes import finetune
from statex.surgery import expand_checkpoint

RESULTS = Path(__file__).resolve().parent / "results" / "auto_layers-cpu.csv"
NUM_PAIRS = (16, 32, 64, 96, 128)
SAMPLES = 32
COLUMNS = ("checkpoint", "num_pairs", "rows", "accuracy", "low", "high", "device", "torch", "statex")


def measure(folder: Path, checkpoint: Path, name: str) -> EvalResult:
    """MQAR of a checkpoint, from `folder` if it is there already."""
    if (folder / "results.json").is_file():
        return load_result(folder)
    return evaluate(checkpoint, ["mqar"], num_pairs=list(NUM_PAIRS), samples=SAMPLES, out=folder, name=name)


def lifted(out: Path, layers: list[int]) -> EvalResult:
    """The checkpoint with its keys lifted ×4 in these layers, trained by the quickstart's recipe."""
    name = f"lifted in layers {', '.join(map(str, layers))}"
    if not (out / "eval" / "results.json").is_file():
        expand_checkpoint(CHECKPOINT, out / "expanded", operator="lift_keys", layers=layers, force=True)
        finetune(out / "expanded", "quickstart", TRAIN, out / "trained", force=True)
    return measure(out / "eval", out / "trained", name)


def write(results: list[EvalResult]) -> None:
    """One line for each checkpoint and number of pairs."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for result in results:
            for cell in result.tasks["mqar"].cells:
                told = [result.name, cell.at["num_pairs"], cell.rows, cell.value, cell.low, cell.high]
                writer.writerow([*told, result.machine["device"], result.versions["torch"], result.versions["statex"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/auto_layers"), help="folder of the two runs")
    out = parser.parse_args().out
    diagnosis = diagnose(CHECKPOINT, heads=False, states=False, operator="lift_keys")
    named = diagnosis.gaining_layers
    others = [finding.layer for finding in diagnosis.layers if finding.layer not in named]
    results = [measure(out / "base", CHECKPOINT, "as released"), lifted(out / "others", others), lifted(out / "named", named)]
    write(results)
    Console().print(compare(results, out / "compare").table())


if __name__ == "__main__":
    main()
