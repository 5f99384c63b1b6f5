"""Mamba's scan and the delta rule: their Triton kernels beside their PyTorch forms, a whole layer and a peer, on one GPU.

    python benchmarks/scans.py --out benchmarks/results/scans-h100.csv
    python benchmarks/scans.py --out benchmarks/results/scans-h100.csv --peers

For each shape: a call of the operation by Triton kernels (`statex`) and in PyTorch (`statex-chunked`), of flash-linear-attention's
where it has one (`fla`), and a whole layer in training, MLP and norms included (`layer`), all on 16,384 tokens in rows of 4,096, in
bfloat16. The layer says what share of a step the operation takes. The floor reads inputs and writes outputs once at 3.0 TB/s, in
the backward twice. What fails is told and leaves no line.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernels import BANDWIDTH, iter_calls, timed, version
from torch import Tensor

import statex
from statex.families import get_family
from statex.kernels.delta import delta_rule
from statex.kernels.selective_scan import selective_scan
from statex.models import StatexForCausalLM

ROWS, LENGTH = 4, 4096
COLUMNS = (
    "op", "impl", "pass", "B", "T", "H", "K", "V", "ms_median", "ms_p10", "ms_p90", "extra_mem_mib", "floor_ms", "device", "torch",
    "impl_version", "date",
)  # fmt: skip
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Heads of [K, V]; Mamba: H channels of K numbers."""

    op: str
    H: int
    K: int
    V: int
    family: str | None = None
    config: tuple[tuple[str, Any], ...] = ()
    """Of a layer of this shape, if there is one in a released model."""


SHAPES = (
    Shape("selective_scan", 4096, 16, 1, "mamba", (("state_size", 16), ("expand", 2))),
    Shape("delta_rule", 16, 128, 128, "delta_net", (("num_heads", 16),)),
    Shape("gated_delta_rule", 6, 256, 512, "gated_deltanet", (("num_heads", 6), ("head_dim", 256), ("expand_v", 2.0))),
    Shape("delta_rule", 4, 512, 128),
)
"""Mamba 1.4B, DeltaNet 1.3B and Gated DeltaNet 1.3B as released, and DeltaNet with four heads merged, beyond fla's 256."""


def inputs_of(shape: Shape, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random inputs as in trained models."""

    def draw(*sizes: int) -> Tensor:
        return torch.randn(rows, length, *sizes, device=device, dtype=torch.bfloat16)

    if shape.op == "selective_scan":
        dt = torch.exp(torch.empty(rows, length, shape.H, device=device).uniform_(-6.9, -2.3))
        A = -torch.arange(1, shape.K + 1, device=device).float().expand(shape.H, shape.K).contiguous()
        return {"x": draw(shape.H), "dt": dt, "A": A, "B": draw(shape.K), "C": draw(shape.K)}
    unit = torch.nn.functional.normalize
    found = {"q": unit(draw(shape.H, shape.K), dim=-1), "k": unit(draw(shape.H, shape.K), dim=-1), "v": draw(shape.H, shape.V)}
    found["beta"] = draw(shape.H).sigmoid()
    if shape.op == "gated_delta_rule":
        found["log_decay"] = -torch.rand(rows, length, shape.H, device=device) / 16
    return found


def own(shape: Shape, backend: str) -> Call:
    """The operation."""
    scale = shape.K**-0.5
    if shape.op == "selective_scan":
        return lambda **x: selective_scan(**x, backend=backend)[0]
    return lambda **x: delta_rule(**x, scale=scale, backend=backend)[0]


def peers(shape: Shape) -> Iterator[tuple[str, Call, str]]:
    """(name, call, version) of the operation's forms elsewhere."""
    scale = shape.K**-0.5
    if shape.op == "selective_scan" or shape.K > 256:
        return
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        print(f"left out: fla cannot be imported ({error})")
        return
    found = version("fla-core", "flash-linear-attention")
    if shape.op == "delta_rule":
        yield "fla", lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta, scale=scale)[0], found
    else:
        yield "fla", lambda q, k, v, beta, log_decay: chunk_gated_delta_rule(q, k, v, log_decay, beta, scale=scale)[0], found


def layer_of(shape: Shape, hidden: int, device: torch.device) -> tuple[Call, torch.nn.Module]:
    """A layer of the shape's family, `x [B, T, hidden] -> Tensor`, and its module: float32 weights, bfloat16 products."""
    config = {"hidden_size": hidden, "vocab_size": 64, "num_hidden_layers": 1, **dict(shape.config)}
    model = StatexForCausalLM.from_description(get_family(str(shape.family)).describe(config, {}), seed=0, device=device).train()

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model.model(inputs_embeds=x, use_cache=False).last_hidden_state

    return call, model


def measure(call: Call, inputs: dict[str, Tensor], module: torch.nn.Module | None, count: int) -> Iterator[dict[str, Any]]:
    """Forward, then forward and backward: times in ms and the memory above the inputs, in MiB."""
    for what in ("fwd", "fwd_bwd"):
        leaves = {name: x.detach().requires_grad_(what == "fwd_bwd" or module is not None) for name, x in inputs.items()}

        def run(_: int, leaves: dict[str, Tensor] = leaves, what: str = what) -> None:
            output = call(**leaves)
            if what == "fwd_bwd":
                output.backward(torch.ones_like(output))
                for x in (*leaves.values(), *(module.parameters() if module is not None else ())):
                    x.grad = None

        run(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(1)
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        times = timed(iter_calls(run), count)
        yield {"pass": what, "times": times, "extra_mem_mib": round(extra)}


def floor_ms(inputs: dict[str, Tensor], output_numbers: int, what: str) -> float:
    """Inputs read and outputs written once, and as much again twice where there is a backward."""
    moved = sum(x.numel() * x.element_size() for x in inputs.values()) + 2 * output_numbers
    return 1e3 * moved * (3 if what == "fwd_bwd" else 1) / BANDWIDTH


def lines(shape: Shape, count: int, beside: bool) -> Iterator[dict[str, Any]]:
    """What is measured of a shape: the operation and its layer, or, `beside`, the peers, which take long to start."""
    device = torch.device("cuda")
    inputs = inputs_of(shape, ROWS, LENGTH, device)
    forms: list[tuple[str, Call, str, dict[str, Tensor], torch.nn.Module | None]]
    if beside:
        forms = [(name, call, found, inputs, None) for name, call, found in peers(shape)]
    else:
        named = {"statex": "triton", "statex-chunked": "chunked"}
        forms = [(name, own(shape, backend), statex.__version__, inputs, None) for name, backend in named.items()]
    if shape.family is not None and not beside:
        layer, weights = layer_of(shape, 2048, device)
        x = {"x": torch.randn(ROWS, LENGTH, 2048, device=device)}
        forms.append((f"layer of {shape.family}", layer, statex.__version__, x, weights))
    for name, call, found, given, module in forms:
        sizes = {"op": shape.op, "impl": name, "B": ROWS, "T": LENGTH, "H": shape.H, "K": shape.K, "V": shape.V}
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "impl_version": found}
        try:
            for measured in measure(call, given, module, count):
                times = measured.pop("times")
                ends = {f"ms_p{tenth}0": round(times[len(times) * tenth // 10], 3) for tenth in (1, 9)}
                floor = "" if module else round(floor_ms(given, ROWS * LENGTH * shape.H * shape.V, measured["pass"]), 3)
                line = sizes | measured | {"ms_median": round(times[len(times) // 2], 3)} | ends | {"floor_ms": floor} | machine
                yield line | {"date": datetime.date.today().isoformat()}
        except Exception as error:
            print(f"failed: {name} {shape}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV that lines are appended to")
    parser.add_argument("--peers", action="store_true", help="time the peers alone, which take long to start")
    parser.add_argument("--count", type=int, default=10, help="calls that are timed")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: operations are timed on a GPU")
    for shape in SHAPES:
        for line in lines(shape, args.count, args.peers):
            new = not args.out.exists()
            with args.out.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(line)
            print(line, flush=True)


if __name__ == "__main__":
    main()
