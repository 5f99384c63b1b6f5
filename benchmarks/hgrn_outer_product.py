"""Recall from nothing: an HGRN whose vector state cannot hold key-value pairs gets HGRN2's matrices by surgery (outer_product).

    python benchmarks/hgrn_outer_product.py --data books_train.jsonl.gz --test books_test.jsonl.gz
    python benchmarks/hgrn_outer_product.py --table           # the committed numbers again, as a table and a figure

A byte-level HGRN is trained on the mixture of `examples/pretrain_tiny.py` (books, needles, MQAR). Then the same fine-tuning is
given to it as it is (`continued`), and to what `statex.expand` makes of it: `preserve` ×16 to ×128, which keeps its function and
adds a number a channel, and `inherit`, which makes an HGRN2 of its weights. Beside them HGRN2s are trained from scratch on as many
tokens as base and fine-tuning together have seen.

What was found, with one seed and two budgets (44 M tokens, a third of them MQAR; 82 M, four fifths): nothing learns to recall, not
even HGRN2s from scratch with up to 65,536 state elements. All models get 72 to 82 % of 2 pairs and at most 10 % of 32, which is 1.4
to 4.4 values a row, whatever its length. So the experiment cannot show what the operator gives. `preserve` keeps text and recall at
the level of continued training (×16: 1.8925 against 1.8922 bits per byte); ×64, ×128 and `inherit` were not reached. A GLA of this
size learns recall from the first mixture (19 % of 64 pairs after 49 M tokens: `statex/assets/gla-quickstart/README.md`).

A guess why: a key is 1 - f, so that writing to a channel is forgetting it, and fresh gates forget fast. Of a new HGRN2's state half
is gone after 1.0, 1.5, 2.4 and 5.2 tokens in its four layers, of a new GLA's after 16 (`measure_memory`, random bytes).
Hardly any gradient then reaches a pair that lies dozens of tokens back.

Each run is a process of its own, several side by side on one GPU, and ends as a line of the CSV; runs that have theirs are skipped,
so the command resumes. `--dry-run` takes a few steps of everything on a CPU in seconds and keeps nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import statex
from statex.families import ModelDescription, get_family
from statex.models import StatexForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from pretrain_tiny import BYTE_OFFSET, PAIRS, VOCAB, Backward, Mixture, Preset, evaluate, learning_rate, read_bytes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "hgrn_outer_product-h100.csv"
FIGURE = ROOT / "docs" / "images" / "hgrn_outer_product.png"
FACTORS = (16, 32, 64, 128)
INHERITED = 64
"""The one factor at which `inherit` is tried."""
BASE, CONTINUED, SCRATCH = "base", "continued", "HGRN2 from scratch"
LABELS = {BASE: "HGRN", CONTINUED: "HGRN, trained on", "preserve": "preserve", "inherit": "inherit", SCRATCH: SCRATCH}
SIZES = ("hidden", "layers", "base_steps", "tune_steps", "text_rows", "mqar_tokens")
"""Columns that tell runs of one size from those of another; only runs of one size are comparable."""
GAIN_RATE = 10.0
"""Learning rate of λ over that of the weights: it must open within a short run."""
EVALUATION_SEED = 2**31


@dataclass(frozen=True)
class Spec:
    """One run; equal specs are the same line of the CSV."""

    arm: str
    factor: int
    seed: int
    hidden: int
    layers: int
    base_steps: int
    tune_steps: int
    text_rows: int
    mqar_tokens: int

    @property
    def base(self) -> Spec | None:
        """The run whose model this one starts from."""
        return None if self.arm in (BASE, SCRATCH) else replace(self, arm=BASE, factor=1)

    @property
    def name(self) -> str:
        """For files and logs."""
        return f"{self.arm.replace(' ', '_')}-x{self.factor}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Steps that this run itself trains."""
        return {BASE: self.base_steps, SCRATCH: self.base_steps + self.tune_steps}.get(self.arm, self.tune_steps)

    def preset(self, window: int) -> Preset:
        """The mixture's sizes."""
        return Preset(
            "hgrn", self.hidden, self.layers, heads=1, key_dim=1, steps=self.steps, window=window, text_rows=self.text_rows,
            mqar_tokens=self.mqar_tokens,
        )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What all runs of a command share."""

    data: Path
    test: Path
    work: Path
    window: int
    rate: float
    warmup: int
    test_bytes: int | None
    compile: bool


def specs(args: argparse.Namespace) -> list[Spec]:
    """All runs, each behind those that it starts from."""
    sizes = (args.hidden, args.layers, args.base_steps, args.tune_steps, args.text_rows, args.mqar_tokens)
    arms = [(BASE, 1), *((SCRATCH, factor) for factor in FACTORS), (CONTINUED, 1), *(("preserve", factor) for factor in FACTORS)]
    return [Spec(arm, factor, seed, *sizes) for seed in range(args.seeds) for arm, factor in [*arms, ("inherit", INHERITED)]]


def description(spec: Spec, family: str) -> ModelDescription:
    """An HGRN, or an HGRN2 of heads of `factor` channels; both with short convolutions, without which pairs do not form."""
    config = {
        "hidden_size": spec.hidden,
        "vocab_size": VOCAB,
        "num_hidden_layers": spec.layers,
        "tie_word_embeddings": True,
        "use_short_conv": True,
    }
    return get_family(family).describe(config | ({"expand_ratio": spec.factor} if family == "hgrn2" else {}), {})


def model_of(spec: Spec, place: Place) -> StatexForCausalLM:
    """The model that a run starts with."""
    if spec.base is None:
        family = "hgrn" if spec.arm == BASE else "hgrn2"
        return StatexForCausalLM.from_description(description(spec, family), seed=spec.seed)
    base = place.work / spec.base.name
    if spec.arm == CONTINUED:
        return statex.load(base, dtype=torch.float32)
    expanded = place.work / spec.name
    statex.expand(base, expanded, operator="outer_product", factor=spec.factor, init=spec.arm, seed=spec.seed, force=True)
    return statex.load(expanded, dtype=torch.float32)


def make_optimizer(model: StatexForCausalLM) -> torch.optim.AdamW:
    """Weight decay on matrices only; each group with its factor on the learning rate."""
    gains = [p for name, p in model.named_parameters() if name.endswith("outer_gain")]
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 16]
    rest = [p for p in model.parameters() if not any(p is other for other in (*gains, *matrices))]
    groups = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for parameters, decay, factor in ((matrices, 0.1, 1.0), (rest, 0.0, 1.0), (gains, 0.0, GAIN_RATE))
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def train(spec: Spec, place: Place) -> dict[str, Any]:
    """Carry out one run; returns its line of the CSV."""
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = model_of(spec, place).to(device).train()
    model.set_backend("chunked")  # what compiles into few launches
    if device.type == "cuda" and place.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    preset = spec.preset(place.window)
    mixture = Mixture(preset, place.data, device, seed=1 + spec.seed + (0 if spec.base is None else 1000))
    backward, optimizer = Backward(model, (preset.text_rows, preset.window)), make_optimizer(model)
    draws, counts = np.random.default_rng([spec.seed, 2]), [n for n in PAIRS if n <= preset.max_pairs]
    tokens = 0
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, spec.steps, place.rate, place.warmup)
        # Few pairs early: the recall circuit forms on short rows and is then stretched.
        reach = counts[: max(3, math.ceil(len(counts) * min(1.0, step / (0.3 * spec.base_steps))))]
        num_pairs = int(draws.choice(reach if spec.base is None else counts))
        ids = mixture.text()
        text_loss = backward(ids, ids)
        rows, answers = mixture.mqar(num_pairs, preset.mqar_tokens // (4 * num_pairs))
        backward(rows, answers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # graphs write into these very tensors
        tokens += ids.numel() + rows.numel()
        if step % 200 == 0:
            elapsed = round(time.monotonic() - began, 1)
            progress = {"run": spec.name, "step": step, "text_bits": text_loss.item() / math.log(2), "seconds": elapsed}
            print(json.dumps(progress), file=sys.stderr, flush=True)
    mixture.generator.manual_seed(EVALUATION_SEED)  # the same rows for every run
    test = torch.from_numpy(read_bytes(place.test)[: place.test_bytes]).to(device).long() + BYTE_OFFSET
    scores = evaluate(model, mixture, test, rows=256 if device.type == "cuda" else 2)
    if spec.arm == BASE:
        model.cpu().save_pretrained(place.work / spec.name)
    before = 0 if spec.base is None else tokens * spec.base_steps // max(spec.steps, 1)
    layers = model.config.description.layers
    return {
        **asdict(spec),
        "tokens": before + tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_elements": sum(layer.state_elements for layer in layers),
        "bits_per_byte": scores["bits_per_byte"],
        **{f"recall_{pairs}": accuracy for pairs, accuracy in scores["mqar"].items()},
        "seconds": round(time.monotonic() - began, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }


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
    while waiting or active:
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
                    for _, other in active:
                        other.terminate()
                    raise SystemExit(f"{spec.name} failed; the runs before it are in {results}")
                if identity(spec) not in done:
                    append(results, json.loads(told[-1]))
        time.sleep(0.2)


def one(order: str) -> None:
    """Carry out one run for the process that drives all; its line is the last thing printed."""
    told = json.loads(order)
    paths = {name: Path(told["place"][name]) for name in ("data", "test", "work")}
    print(json.dumps(train(Spec(**told["spec"]), Place(**told["place"] | paths))), flush=True)


Group = dict[tuple[str, int], list[dict[str, str]]]
"""Lines of the CSV by arm and factor: the seeds of one kind of run."""


def table(results: Path, figure: Path) -> None:
    """For each size of runs a Markdown table, a row for each kind of run, means over seeds; and recall by number of pairs."""
    by_sizes: dict[tuple[int, ...], Group] = {}
    for line in lines(results):
        group = by_sizes.setdefault(tuple(int(line[name]) for name in SIZES), {})
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


def title(sizes: tuple[int, ...]) -> str:
    """The sizes of runs in words."""
    told = dict(zip(SIZES, sizes, strict=True))
    return (
        f"{told['layers']} layers of {told['hidden']}, {told['base_steps']:,} + {told['tune_steps']:,} steps, "
        f"each {told['text_rows']} windows of text and {told['mqar_tokens']:,} tokens of MQAR"
    )


def pairs_of(group: Group) -> list[int]:
    """Numbers of pairs that runs were asked for."""
    return [pairs for pairs in PAIRS if f"recall_{pairs}" in next(iter(group.values()))[0]]


def mean(runs: list[dict[str, str]], column: str) -> float:
    """Mean over seeds."""
    return sum(float(line[column]) for line in runs) / len(runs)


def draw(by_sizes: dict[tuple[int, ...], Group], path: Path) -> None:
    """Recall by number of pairs, a row of panels for each size of runs: the HGRN and what comes of it; HGRN2s from scratch."""
    panels = {"HGRN and outer_product": (BASE, CONTINUED, "preserve", "inherit"), "HGRN2 from scratch": (SCRATCH,)}
    styles = {BASE: "k:", CONTINUED: "k--", "inherit": "s-."}
    figure, rows = plt.subplots(len(by_sizes), 2, figsize=(9, 3.4 * len(by_sizes)), sharey=True, squeeze=False)
    for axes, group in zip(rows, by_sizes.values(), strict=True):
        pairs = pairs_of(group)
        for axis, (name, arms) in zip(axes, panels.items(), strict=True):
            for arm, factor in (kind for kind in group if kind[0] in arms):
                recall = [mean(group[arm, factor], f"recall_{n}") for n in pairs]
                color = {} if factor == 1 else {"color": f"C{FACTORS.index(factor)}"}
                axis.plot(pairs, recall, styles.get(arm, "o-"), label=LABELS[arm] + ("" if factor == 1 else f" ×{factor}"), **color)
            budget = max(int(line["tokens"]) for runs in group.values() for line in runs) / 1e6
            axis.set(title=f"{name}, {budget:.0f} M tokens", xlabel="key-value pairs", xscale="log", ylim=(0, 1.03))
            axis.set_xticks(ticks := [n for n in pairs if n in (2, 4, 8, 16, 32, 64, 128)], [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc="upper right")
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
    for name, value in (("hidden", 128), ("layers", 4), ("base-steps", 1200), ("tune-steps", 600), ("text-rows", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mqar-tokens", type=int, default=8192, help="tokens of MQAR rows in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, in base and fine-tuning alike")
    parser.add_argument("--no-compile", action="store_true", help="CUDA graphs alone: slower steps, no minute of compilation")
    parser.add_argument("--table", action="store_true", help="print and draw what the CSV holds, and train nothing")
    parser.add_argument("--dry-run", action="store_true", help="a few steps of everything on a CPU; nothing is kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one)
        return
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
