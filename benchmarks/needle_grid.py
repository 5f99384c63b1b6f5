"""How long the needle grid takes: lengths up to `--longest` x 11 depths, on a checkpoint or on random weights of a published shape.

    python benchmarks/needle_grid.py                                          # the quickstart model up to 4K, on a CPU
    python benchmarks/needle_grid.py --shape gla-1.3b --longest 65536 --samples 10 --device cuda --out grid.csv

Random weights take as long as trained ones; their recall means nothing and is not written. Tokens are bytes. Each length is a run
of its own, appended to the CSV with the time (and that of the processor, which others may share), the tokens read and the peak
memory (on a CPU that of the whole process); a length that the file has is not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer

import statex
from statex.errors import StatexError
from statex.evals.subject import Subject, load_subject
from statex.evals.task import Context, Options
from statex.evals.tasks import TASKS
from statex.families import get_family
from statex.models import StatexForCausalLM

ASSETS = Path(statex.__file__).parent / "assets"
CHECKPOINT, HELD_OUT = ASSETS / "gla-quickstart", ASSETS / "books_test.jsonl.gz"
DEPTHS = tuple(depth / 10 for depth in range(11))
SHAPES: dict[str, dict[str, Any]] = {
    "gla-1.3b": {"model_type": "gla", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "expand_k": 0.5}
    | {"expand_v": 1.0, "intermediate_size": 5632, "vocab_size": 32000},
    "mamba2-1.3b": {"model_type": "mamba2", "hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64, "head_dim": 64}
    | {"state_size": 128, "n_groups": 1, "vocab_size": 50288, "tie_word_embeddings": True},
    "gla-tiny": {"model_type": "gla", "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 1, "vocab_size": 259},
}


class Counting(Subject):
    """Counts the tokens that the model reads."""

    tokens = 0

    def forward(self, rows: torch.Tensor, keep: int, cache: Any = None) -> torch.Tensor:
        self.tokens += rows.numel()
        return super().forward(rows, keep, cache)


def subject_of(arguments: argparse.Namespace) -> Counting:
    """The checkpoint, or random weights of the shape asked for."""
    if arguments.shape is None:
        loaded = load_subject(arguments.checkpoint, device=arguments.device)
        return Counting(loaded.model, loaded.tokenizer, identity=loaded.identity)
    config = SHAPES[arguments.shape]
    description = get_family(config["model_type"]).describe(config, {})
    model = StatexForCausalLM.from_description(description, device=arguments.device)
    wide = re.compile("|".join(model._keep_in_fp32_modules_strict))  # decays, which stay float32 in a loaded checkpoint too
    for name, parameter in model.named_parameters():
        if not wide.search(name):
            parameter.data = parameter.data.to(getattr(torch, arguments.dtype))
    return Counting(model.eval(), ByT5Tokenizer(extra_ids=0), identity={"name": f"{arguments.shape} (random)"})


def measure(subject: Counting, length: int, samples: int, data: Path) -> dict[str, Any]:
    """Run one length of the grid."""
    context = Context(subject.tokenizer, Options((length,), DEPTHS, (4,), samples=samples, seed=0, data=data))
    (job,) = TASKS["niah"].schedule(context).jobs
    on_gpu = subject.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(subject.device)
    before, began, worked = subject.tokens, time.perf_counter(), time.process_time()
    job.run(subject, lambda rows: None)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(subject.device) if on_gpu else resident
    return {
        "model": subject.identity["name"],
        "length": length,
        "depths": len(DEPTHS),
        "samples": samples,
        "seconds": round(seconds, 2),
        "processor_seconds": round(worked, 2),
        "tokens_read": subject.tokens - before,
        "tokens_of_all_prompts": samples * len(DEPTHS) * length,
        "peak_mib": round(peak / 2**20),
    }


def machine(device: torch.device) -> str:
    """What computes, with the load that others put on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo, model = Path("/proc/cpuinfo"), platform.machine()
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{load}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="a checkpoint folder with its tokenizer")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, instead of a checkpoint")
    parser.add_argument("--longest", type=int, default=4096, help="lengths are 256, 512 ... up to this one")
    parser.add_argument("--samples", type=int, default=50, help="texts a length")
    parser.add_argument("--data", type=Path, default=HELD_OUT, help="the haystack's text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of random weights")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; leave out --device")
    try:
        subject = subject_of(arguments)
    except StatexError as error:
        parser.error(str(error))
    have = list(csv.DictReader(arguments.out.open())) if arguments.out and arguments.out.is_file() else []
    done = {(row["model"], int(row["length"]), int(row["samples"])) for row in have}
    length = 256
    while length <= arguments.longest:
        if (subject.identity["name"], length, arguments.samples) not in done:
            where = machine(subject.device)
            row = measure(subject, length, arguments.samples, arguments.data) | {"machine": where}
            row |= {"statex": statex.__version__, "torch": torch.__version__, "transformers": version("transformers")}
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if arguments.out:
                fresh = not arguments.out.is_file()
                with arguments.out.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)
        length *= 2


if __name__ == "__main__":
    with torch.inference_mode():
        main()
