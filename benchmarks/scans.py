"""Mamba's and HGRN's scans and the delta rule: Triton kernels beside PyTorch forms, a whole layer and peers, on one GPU.

    python benchmarks/scans.py --out benchmarks/results/scans-h100.csv
    python benchmarks/scans.py --out benchmarks/results/scans-h100.csv --peers
    python benchmarks/scans.py --out benchmarks/results/scans-h100.csv --pass decode

For each shape: a call of the operation by Triton kernels (`statex`) and in PyTorch (`statex-chunked`), of flash-linear-attention's
where it has one (`fla`), and a whole layer in training, MLP and norms included (`layer`), all on 16,384 tokens in rows of 4,096, in
bfloat16. A call is queued while the device is kept waiting, so that its own time is measured, not the host's. The layer says what
share of a step the operation takes. The floor reads inputs and writes outputs once at 3.0 TB/s, in the backward twice.

`--pass decode` times one token of the delta rule and of Mamba's scan within a replayed graph, by a Triton kernel (`statex`), in
PyTorch (`statex-pytorch`) and with `--peers` elsewhere; its floor reads and writes the state once. What fails is told and leaves no
line.
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
from unittest import mock

import torch
from timing import BANDWIDTH, DECODE_BATCHES, iter_calls, timed_tokens, version
from torch import Tensor

import statex
from statex.families import get_family
from statex.kernels import delta_rule, delta_rule_step, hgrn, selective_scan, selective_scan_step, triton_backend
from statex.models import StatexForCausalLM

ROWS, LENGTH = 4, 4096
WAITING = 5_000_000
"""Cycles that a device waits, some 3 ms, while the host queues a call."""
COLUMNS = (
    "op", "impl", "pass", "B", "T", "H", "K", "V", "ms_median", "ms_p10", "ms_p90", "extra_mem_mib", "floor_ms", "device", "torch",
    "impl_version", "date",
)  # fmt: skip
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Heads of [K, V]; Mamba and HGRN: H channels of K numbers."""

    op: str
    H: int
    K: int
    V: int
    family: str | None = None
    config: tuple[tuple[str, Any], ...] = ()
    """Of a layer of this shape, if there is one in a released model."""


SHAPES = (
    Shape("selective_scan", 4096, 16, 1, "mamba", (("state_size", 16), ("expand", 2))),
    Shape("hgrn", 2048, 1, 1, "hgrn"),
    Shape("delta_rule", 16, 128, 128, "delta_net", (("num_heads", 16),)),
    Shape("gated_delta_rule", 6, 256, 512, "gated_deltanet", (("num_heads", 6), ("head_dim", 256), ("expand_v", 2.0))),
    Shape("delta_rule", 4, 512, 128),
)
"""Mamba 1.4B, HGRN, DeltaNet and Gated DeltaNet 1.3B as released, and DeltaNet with four heads merged, beyond fla's 256."""


def inputs_of(shape: Shape, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random inputs as in trained models."""

    def draw(*sizes: int) -> Tensor:
        return torch.randn(rows, length, *sizes, device=device, dtype=torch.bfloat16)

    if shape.op == "selective_scan":
        dt = torch.exp(torch.empty(rows, length, shape.H, device=device).uniform_(-6.9, -2.3))
        A = -torch.arange(1, shape.K + 1, device=device).float().expand(shape.H, shape.K).contiguous()
        return {"x": draw(shape.H), "dt": dt, "A": A, "B": draw(shape.K), "C": draw(shape.K)}
    if shape.op == "hgrn":
        return {"x": draw(shape.H), "log_decay": torch.nn.functional.logsigmoid(4 + draw(shape.H).float())}
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
    if shape.op == "hgrn":
        return lambda **x: hgrn(**x, backend=backend)[0]
    return lambda **x: delta_rule(**x, scale=scale, backend=backend)[0]


def peers(shape: Shape) -> Iterator[tuple[str, Call, str]]:
    """(name, call, version) of the operation's forms elsewhere."""
    scale = shape.K**-0.5
    if shape.op == "selective_scan" or shape.K > 256:
        return
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
    except ImportError as error:
        print(f"left out: fla cannot be imported ({error})")
        return
    found = version("fla-core", "flash-linear-attention")
    if shape.op == "hgrn":
        yield "fla, chunk", lambda x, log_decay: chunk_hgrn(x, log_decay)[0], found
        yield "fla, fused_recurrent", lambda x, log_decay: fused_recurrent_hgrn(x, log_decay)[0], found
    elif shape.op == "delta_rule":
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


def measure(
    call: Call, inputs: dict[str, Tensor], module: torch.nn.Module | None, count: int
) -> Iterator[tuple[str, list[float], int]]:
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
        yield what, timed_when_queued(iter_calls(run), count), round(extra)


def timed_when_queued(call: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of `count` calls on the device, from the first kernel to the last, with no wait for the host between them."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        torch.cuda._sleep(WAITING)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)


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
        try:
            for what, times, extra in measure(call, given, module, count):
                floor = "" if module else round(floor_ms(given, ROWS * LENGTH * shape.H * shape.V, what), 3)
                yield line_of(shape, name, what, ROWS, LENGTH, times, extra, floor, found)
        except Exception as error:
            print(f"failed: {name} {shape}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
        torch.cuda.empty_cache()


def steps(shape: Shape, batch: int, beside: bool, device: torch.device) -> Iterator[tuple[str, Callable[[int], Any], str]]:
    """(name, one token on the i-th of several states, version)."""
    rows = {name: x if name == "A" else x[:, 0] for name, x in inputs_of(shape, batch, 1, device).items()}
    copies = max(2, min(16, 2**28 // (4 * batch * shape.H * shape.K * shape.V)))
    scan, scale = shape.op == "selective_scan", shape.K**-0.5
    states = torch.zeros(copies, batch, *((1, shape.K, shape.H) if scan else (shape.H, shape.K, shape.V)), device=device)
    if beside:
        yield from peer_steps(shape, rows, states)
        return

    def step(i: int) -> Tensor:
        state = states[i % copies]
        if scan:
            return selective_scan_step(**rows, state=state)
        return delta_rule_step(**{"log_decay": None} | rows, state=state, scale=scale)

    def in_pytorch(i: int) -> Tensor:
        with mock.patch.object(triton_backend, "step_kernel", return_value=None):
            return step(i)

    yield "statex", step, statex.__version__
    yield "statex-pytorch", in_pytorch, statex.__version__


def peer_steps(shape: Shape, rows: dict[str, Tensor], states: Tensor) -> Iterator[tuple[str, Callable[[int], Any], str]]:
    """As `steps`, of other packages; what cannot be imported is told and left out."""
    try:
        if shape.op == "selective_scan":
            from mamba_ssm.ops.triton.selective_state_update import selective_state_update

            turned = states.squeeze(2).mT.contiguous()  # [copies, B, channels, numbers]
            bias = torch.zeros_like(rows["dt"][0])
            x, dt, A, B, C = (rows[name] for name in ("x", "dt", "A", "B", "C"))
            yield (
                "mamba_ssm",
                lambda i: selective_state_update(turned[i % len(turned)], x, dt, A, B, C, dt_bias=bias),
                version("mamba_ssm"),
            )
        elif shape.K <= 256:
            from fla.ops.delta_rule import fused_recurrent_delta_rule
            from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

            token = {name: x[:, None] for name, x in rows.items()}
            token["g"] = token.pop("log_decay", token["beta"])
            options = {"scale": shape.K**-0.5, "output_final_state": True}
            call = fused_recurrent_gated_delta_rule
            if shape.op == "delta_rule":
                call = fused_recurrent_delta_rule
                del token["g"]
            found = version("fla-core", "flash-linear-attention")
            yield "fla", lambda i: call(**token, **options, initial_state=states[i % len(states)]), found
    except ImportError as error:
        print(f"left out: {error}")


@torch.no_grad()
def decode_lines(shape: Shape, count: int, beside: bool) -> Iterator[dict[str, Any]]:
    """One token at several batch sizes."""
    device = torch.device("cuda")
    for batch in DECODE_BATCHES:
        for name, step, found in steps(shape, batch, beside, device):
            try:
                times = timed_tokens(step, 3 * count)
            except Exception as error:
                print(f"failed: {name} {shape}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
                continue
            floor = 1e3 * 2 * 4 * batch * shape.H * shape.K * shape.V / BANDWIDTH
            yield line_of(shape, name, "decode", batch, 1, times, "", round(floor, 5), found)
        torch.cuda.empty_cache()


def line_of(
    shape: Shape, name: str, what: str, batch: int, tokens: int, times: list[float], extra: object, floor: object, found: str
) -> dict[str, Any]:
    """One line of the table."""
    digits = 5 if what == "decode" else 3
    return {
        "op": shape.op, "impl": name, "pass": what, "B": batch, "T": tokens, "H": shape.H, "K": shape.K, "V": shape.V,
        "ms_median": round(times[len(times) // 2], digits), "ms_p10": round(times[len(times) // 10], digits),
        "ms_p90": round(times[len(times) * 9 // 10], digits), "extra_mem_mib": extra, "floor_ms": floor,
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "impl_version": found,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV that lines are appended to")
    parser.add_argument("--peers", action="store_true", help="time the peers alone, which take long to start")
    parser.add_argument("--op", choices=sorted({shape.op for shape in SHAPES}), help="time the shapes of this one alone")
    parser.add_argument("--pass", choices=("train", "decode"), default="train", dest="what", help="whole rows, or one token")
    parser.add_argument("--count", type=int, default=10, help="calls that are timed")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: operations are timed on a GPU")
    chosen = [shape for shape in SHAPES if args.op in (None, shape.op) and (args.what == "train" or shape.op != "hgrn")]
    for shape in chosen:
        for line in (lines if args.what == "train" else decode_lines)(shape, args.count, args.peers):
            new = not args.out.exists()
            with args.out.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(line)
            print(line, flush=True)


if __name__ == "__main__":
    main()
