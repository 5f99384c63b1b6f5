"""Time a training step of whole models at the shapes of GLA-1.3B and Mamba2-1.3B with random weights, on one GPU.

    python benchmarks/train_step.py --out benchmarks/results/train_step-h100.csv

Plans: `base` as released; `paper` the layers that StateX expands in the family; GLA besides: `all` every layer merged ×4, all
merged layers so far with the mixing matrix that keeps the function; `unmixed` every layer merged without one, as the paper draws
them anew. `fla`: `base`, and `all`, which it computes unmixed, in flash-linear-attention's own model (GLA only, and only where it
can be imported). A step is forward, loss, backward
and AdamW on one row of T tokens, float32 weights under bfloat16 autocast. Pass `train`: with gradient checkpointing in all layers;
`train_fitted`: in as many as memory asks for, which `statex` finds out for either model (`statex.models.activations`). Generation:
tokens a second of greedy decoding from a short prompt, bfloat16 weights (decay parameters float32). Rows that the table holds
already are skipped; each (model, plan, T) runs in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lists import some_of, whole_numbers

COLUMNS = (
    "model", "impl", "plan", "pass", "B", "T", "tokens_per_s", "ms_median", "ms_p10", "ms_p90", "peak_mem_mib",
    "checkpointed_layers", "parameters", "device", "torch", "triton", "impl_version", "date",
)  # fmt: skip
IDENTITY = ("model", "impl", "plan", "pass", "B", "T", "device", "torch", "triton", "impl_version")
GLA: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "expand_k": 0.5, "expand_v": 1.0}
MAMBA2: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64, "head_dim": 64, "expand": 2, "n_groups": 1}
CONFIGS = {
    "gla": GLA | {"vocab_size": 32000, "intermediate_size": 5632},
    "mamba2": MAMBA2 | {"state_size": 128, "vocab_size": 50288, "tie_word_embeddings": True},
}
EXPANSION = 4
PAPER_LAYERS = {"gla": 6, "mamba2": 1}
"""StateX expands every so many layers."""

PLANS = {"gla": ("base", "paper", "all", "unmixed"), "mamba2": ("base", "paper")}
"""In Mamba-2 the paper's plan is all layers."""
LENGTHS = (65_536, 32_768, 16_384, 8_192, 0)
"""Tokens in a row; 0: generation."""

DECODE_BATCHES = (1, 64)
NEW_TOKENS = 256
PASSES = ("train", "train_fitted", "generate")


@dataclass(frozen=True)
class Job:
    """What one process measures; `tokens` 0: generation."""

    family: str
    impl: str
    plan: str
    tokens: int
    passes: tuple[str, ...]

    def rows(self, what: str) -> list[tuple[str, int, int]]:
        """Pass, batch and tokens of a pass's rows."""
        return [(what, 1, self.tokens)] if self.tokens else [(what, batch, NEW_TOKENS) for batch in DECODE_BATCHES]

    def beyond(self, known: set[tuple[str, ...]]) -> Job:
        """What is not measured yet."""
        model = (f"{self.family}-1.3b", self.impl, self.plan)
        return replace(
            self, passes=tuple(p for p in self.passes if not {(*model, *map(str, row)) for row in self.rows(p)} <= known)
        )


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """The longest rows first, fla beside the plans that it can hold."""
    for tokens in sorted(args.lengths, reverse=True):
        passes = tuple(what for what in args.passes if (what == "generate") == (not tokens))
        for family in args.family:
            for plan in (plan for plan in PLANS[family] if plan in args.plans):
                if "statex" in args.impl:
                    yield Job(family, "statex", plan, tokens, passes)
                if "fla" in args.impl and family == "gla" and plan in ("base", "all") and tokens:
                    yield Job(family, "fla", plan, tokens, passes)


def description(family: str, plan: str, shrink: int) -> Any:
    """The model of a plan. Surgery's results are written down directly: for timing, only shapes matter."""
    from statex.families import get_family

    config = dict(CONFIGS[family])
    config["num_hidden_layers"] = max(2, config["num_hidden_layers"] // shrink)
    model = get_family(family).describe(config, {})
    every = {"base": 0, "paper": PAPER_LAYERS[family], "all": 1, "unmixed": 1}[plan]
    mixing = None if plan == "unmixed" else "channel"
    layers = (expanded(family, x, mixing) if every and i % every == 0 else x for i, x in enumerate(model.layers))
    return replace(model, layers=tuple(layers))


def expanded(family: str, layer: Any, mixing: str | None) -> Any:
    """GLA: all heads merged into one. Mamba-2: four times the d_state."""
    if family == "mamba2":
        return layer.replace(key_dim=EXPANSION * layer.key_dim)
    heads = layer.key_heads
    return layer.replace(
        query_heads=1, key_heads=1, value_heads=1, key_dim=layer.key_dim * heads, value_dim=layer.value_dim * heads,
        blocks=heads if mixing else 1, mixing=mixing, norm_groups=layer.norm_groups if mixing else 1,
    )  # fmt: skip


def build(job: Job, shrink: int, device: str) -> tuple[Any, str]:
    """A model to train, with gradient checkpointing, or to generate with, in bfloat16; and the version of what it is made with."""
    import torch

    if job.impl == "fla":
        import fla
        from fla.models import GLAConfig, GLAForCausalLM

        config = dict(CONFIGS["gla"], fuse_cross_entropy=True)
        config["num_hidden_layers"] = max(2, config["num_hidden_layers"] // shrink)
        if job.plan == "all":
            config["num_heads"] = 1
        model = GLAForCausalLM(GLAConfig(**config)).to(device)
        version = fla.__version__
    else:
        import statex
        from statex.models import StatexConfig, StatexForCausalLM

        config = StatexConfig.from_description(description(job.family, job.plan, shrink))
        model = StatexForCausalLM.empty(config, dtype=torch.float32, device=device)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # on the device: a family's own init draws on the CPU, which takes a minute
        version = statex.__version__
        wide = re.compile("|".join(model._keep_in_fp32_modules_strict))
        for name, parameter in model.named_parameters():
            if not job.tokens and not wide.search(name):
                parameter.data = parameter.data.to(torch.bfloat16)
    if job.tokens:
        model.gradient_checkpointing_enable()
    return model.train(), version


def measure(job: Job, shrink: int, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of one job."""
    import torch

    model, version = build(job, shrink, device)
    parameters = sum(p.numel() for p in model.parameters())

    def row(what: str, batch: int, tokens: int, seconds: list[float]) -> dict[str, Any]:
        counted = batch * tokens
        low, median, high = (1e3 * statistics.quantiles(seconds, n=10, method="inclusive")[i] for i in (0, 4, 8))
        return identity(job, what, batch, tokens, version) | {
            "tokens_per_s": round(1e3 * counted / median),
            "ms_median": round(median, 3),
            "ms_p10": round(low, 3),
            "ms_p90": round(high, 3),
            "peak_mem_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else "",
            "checkpointed_layers": checkpointed_layers(model) if job.tokens else "",
            "parameters": parameters,
            "date": datetime.date.today().isoformat(),
        }

    if job.tokens:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
        ids = torch.randint(100, (1, job.tokens), device=device)
        own = {"return_logits": False} if job.impl == "statex" else {}

        def step() -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, **own).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for what in job.passes:
            if what == "train_fitted":
                fit(model, step, device)
            yield row(what, 1, job.tokens, timed(step, repeats, device))
        return
    model.eval()
    for what, batch, tokens in job.rows("generate"):
        prompt = torch.randint(100, (batch, 16), device=device)
        new = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        seconds = timed(partial(model.generate, prompt, **new, do_sample=False), max(2, repeats // 3), device)
        yield row(what, batch, tokens, seconds)


def fit(model: Any, step: Callable[[], None], device: str) -> None:
    """Train until it is known how many layers have to be checkpointed."""
    import torch

    from statex.models.activations import CudaMemory, FittedCheckpointing

    fitted = FittedCheckpointing(model, CudaMemory(torch.device(device, torch.cuda.current_device())))
    while not fitted.settled:
        with fitted.step():
            step()


def checkpointed_layers(model: Any) -> int:
    """How many layers run a second time in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return sum(layer.gradient_checkpointing for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))


def timed(call: Any, repeats: int, device: str) -> list[float]:
    """Seconds of each call after two to warm up."""
    import torch

    seconds = []
    for i in range(repeats + 2):
        if i == 2 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            seconds.append(time.perf_counter() - began)
    return seconds


def identity(job: Job, what: str, batch: int, tokens: int, version: str) -> dict[str, Any]:
    """What a row measures."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "model": f"{job.family}-1.3b", "impl": job.impl, "plan": job.plan, "pass": what, "B": batch, "T": tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch": torch.__version__,
        "triton": triton_version, "impl_version": version,
    }  # fmt: skip


def known(out: Path) -> set[tuple[str, ...]]:
    """Identities of the rows that are there, without the version, which only a built model tells."""
    if not out.exists():
        return set()
    with out.open(newline="") as file:
        return {tuple(line[name] for name in IDENTITY[:6]) for line in csv.DictReader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV that rows are appended to")
    parser.add_argument("--family", type=some_of(*CONFIGS), default="gla,mamba2")
    parser.add_argument("--impl", type=some_of("statex", "fla"), default="statex,fla")
    parser.add_argument("--plans", type=some_of("base", "paper", "all", "unmixed"), default="base,paper,all,unmixed")
    parser.add_argument("--passes", type=some_of(*PASSES), default=",".join(PASSES))
    lengths = "tokens in a row; 0 stands for generation"
    parser.add_argument("--lengths", type=whole_numbers, default=",".join(map(str, LENGTHS)), help=lengths)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--shrink", type=int, default=1, help="divide the number of layers, to try the driver out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after this time")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        for line in measure(Job(**json.loads(args.work)), args.shrink, args.device, args.repeats):
            print("ROW " + json.dumps(line), flush=True)
        return
    require_device(parser, args.device)
    began = time.monotonic()
    for job in jobs(args):
        wanted = job.beyond(known(args.out))
        if not wanted.passes:
            continue
        if time.monotonic() - began > args.seconds:
            print("out of time; start again to go on")
            return
        run(wanted, args)


def require_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends with a message where the device is missing."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu with a large --shrink tries the driver out")


def run(job: Job, args: argparse.Namespace) -> None:
    """One job in a process of its own; one that fails (out of memory, no fla) is reported and leaves no row."""
    options = ["--out", str(args.out), "--repeats", str(args.repeats), "--shrink", str(args.shrink), "--device", args.device]
    command = [sys.executable, __file__, *options, "--work", json.dumps(asdict(job))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    new = not args.out.exists()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        print(
            f"{line['model']} {line['impl']:7} {line['plan']:6} {line['pass']:12} B={line['B']} T={line['T']}:"
            f" {line['tokens_per_s']:,} tokens/s, {line['ms_median']} ms, peak {line['peak_mem_mib'] or '-'} MiB,"
            f" {line['checkpointed_layers'] or 'no'} checkpointed layers",
            flush=True,
        )
    if done.returncode:
        print(f"failed: {job}\n{done.stderr[-1200:]}", flush=True)


if __name__ == "__main__":
    main()
