"""Time the Triton kernels beside flash-linear-attention and mamba_ssm on one GPU, at the layer shapes of GLA-1.3B and Mamba2-1.3B.

    python benchmarks/kernels.py --out benchmarks/results/kernels-h100.csv

Every (implementation, shape) runs in a process of its own, because the peers' autotuning caches leave out sizes that matter. Rows
that the table already holds for this device and these versions are skipped, so the driver can be stopped and started again. The
peers need `pip install flash-linear-attention` and mamba_ssm's `ops/triton` folder on the path; those that cannot be imported are
left out.

Forward and forward+backward: CUDA events around single calls, inputs rotated so that they do not lie in the cache. Decode: CUDA
graphs of several tokens over rotated states, so that launch overheads, which a serving loop captures too, do not count. Memory is
the peak above the inputs, gradients and outputs included. The floor is the larger of bytes over 3.0 TB/s and operations over 600
TFLOP/s, with states written and read once per 256 tokens in bfloat16 (a decode step: the state read and written once).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lists import some_of, whole_numbers
from timing import BANDWIDTH, DECODE_BATCHES, iter_calls, timed, timed_tokens, version

COLUMNS = (
    "op", "impl", "pass", "B", "T", "H", "K", "V", "dtype", "ms_median", "ms_p10", "ms_p90", "extra_mem_mib", "floor_ms",
    "first_result_s", "device", "torch", "triton", "impl_version", "date",
)  # fmt: skip
IDENTITY = ("op", "impl", "pass", "B", "T", "H", "K", "V", "dtype", "device", "torch", "triton", "impl_version")
"""Columns that say what a row measured: a row that agrees in all of them is
not measured again."""

PEERS = {"gla": "fla", "ssd": "mamba_ssm"}
TOKENS = 65_536
"""Tokens in a batch, whatever the sequence length."""

PEAK = 600e12
FLOOR_CHUNK = 256


@dataclass(frozen=True)
class Shape:
    """A layer. GLA: H heads of [K, V]; lifted keys: K as stored, `lift` parts. SSD: H heads of head_dim V, d_state K, one group."""

    op: str
    H: int
    K: int
    V: int
    lift: int = 1
    expanded: bool = False


SHAPES = [
    Shape("gla", 1, 1024, 2048, expanded=True),
    Shape("ssd", 64, 512, 64, expanded=True),
    Shape("gla", 4, 1024, 512, lift=4),
    Shape("ssd", 64, 512, 64, lift=4),
    Shape("gla", 4, 256, 512),
    Shape("ssd", 64, 128, 64),
    Shape("gla", 2, 512, 1024),
    Shape("ssd", 64, 256, 64),
]


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    shape: Shape
    impl: str
    tokens: int
    """Tokens in a sequence; 0: decode."""


def jobs(impls: list[str], ops: list[str], lengths: list[int]) -> Iterator[Job]:
    """Expanded shapes and the longest sequences first."""
    for tokens in (*sorted(lengths, reverse=True), 0):
        for shape in SHAPES:
            for impl in ("statex", PEERS[shape.op]):
                peer_cannot = impl != "statex" and shape.lift > 1
                if impl in impls and shape.op in ops and not peer_cannot:
                    yield Job(shape, impl, tokens)


def floor_ms(shape: Shape, batch: int, tokens: int, what: str, state_bytes: int = 4) -> float:
    """Least time of one call, see the module's text."""
    key_rows = shape.H if shape.op == "gla" else 1  # SSD's B and C are shared by all heads
    state = shape.H * shape.K * shape.V
    if what == "decode":
        return 1e3 * 2 * batch * state * state_bytes / BANDWIDTH
    rows = batch * tokens
    stored_keys = key_rows * shape.K // shape.lift
    inputs = rows * (2 * 2 * stored_keys + 2 * shape.H * shape.V + 4 * (stored_keys if shape.op == "gla" else shape.H))
    outputs = rows * 2 * shape.H * shape.V
    states = 2 * 2 * rows // FLOOR_CHUNK * state
    pairs = 2 * rows * FLOOR_CHUNK // 2 * (key_rows * shape.K + shape.H * shape.V)
    forward_bytes, forward_operations = inputs + outputs + states, 4 * rows * state + pairs
    if what == "fwd":
        return 1e3 * max(forward_bytes / BANDWIDTH, forward_operations / PEAK)
    # Backward: states once more, their gradients, and the gradients of queries, keys and values: five products of the state's size.
    backward_bytes, backward_operations = 2 * inputs + 2 * outputs + 2 * states, 10 * rows * state + 3 * pairs
    return 1e3 * (
        max(forward_bytes / BANDWIDTH, forward_operations / PEAK) + max(backward_bytes / BANDWIDTH, backward_operations / PEAK)
    )


def inputs_of(shape: Shape, batch: int, tokens: int) -> dict[str, Any]:
    """Random inputs of one call on the GPU, bfloat16; decays as in the released models."""
    import torch

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    if shape.op == "gla":
        key_dim = shape.K // shape.lift
        found = {"q": draw(batch, tokens, shape.H, key_dim), "k": draw(batch, tokens, shape.H, key_dim)}
        found |= {"v": draw(batch, tokens, shape.H, shape.V)}
        found["log_decay"] = torch.nn.functional.logsigmoid(draw(batch, tokens, shape.H, key_dim).float()) / 16
        if shape.lift > 1:
            found["lift_gamma"] = torch.randn(shape.H, shape.K - key_dim, device="cuda")
        return found
    d_state = shape.K // shape.lift
    found = {"x": draw(batch, tokens, shape.H, shape.V)}
    found["dt"] = torch.exp(torch.empty(batch, tokens, shape.H, device="cuda").uniform_(-6.9, -2.3))
    found["A"] = -torch.linspace(1, 16, shape.H, device="cuda")
    found |= {"B": draw(batch, tokens, 1, d_state), "C": draw(batch, tokens, 1, d_state), "D": torch.randn(shape.H, device="cuda")}
    if shape.lift > 1:
        found["lift_gamma"] = torch.randn(1, shape.K - d_state, device="cuda")
    return found


def implementation(job: Job) -> tuple[Callable[..., Any], str]:
    """The call `f(**inputs) -> output` of one implementation, and its version."""
    shape = job.shape
    scale = (shape.K // shape.lift) ** -0.5
    if job.impl == "statex":
        import statex
        from statex.kernels import gla, ssd

        call = (lambda **x: gla(**x, scale=scale)[0]) if shape.op == "gla" else (lambda **x: ssd(**x)[0])
        return call, statex.__version__
    if job.impl == "fla":
        from fla.ops.gla import chunk_gla

        return lambda q, k, v, log_decay: chunk_gla(q, k, v, log_decay, scale=scale)[0], version(
            "fla-core", "flash-linear-attention"
        )
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D), version("mamba_ssm")


def decoder(job: Job, batch: int) -> Callable[[int], Any]:
    """A function that does one token on the i-th of several states."""
    import torch

    shape = job.shape
    copies = max(2, min(16, 2**28 // (4 * batch * shape.H * shape.K * shape.V)))
    rows = {name: x[:, 0] if x.dim() > 2 else x for name, x in inputs_of(shape, batch, 1).items()}
    scale = (shape.K // shape.lift) ** -0.5
    if job.impl == "mamba_ssm":
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        states = torch.zeros(copies, batch, shape.H, shape.V, shape.K, device="cuda")
        A = rows["A"][:, None, None].expand(shape.H, shape.V, shape.K)
        dt, D = rows["dt"][..., None].expand(-1, -1, shape.V), rows["D"][:, None].expand(shape.H, shape.V)
        bias = torch.zeros(shape.H, 1, device="cuda").expand(shape.H, shape.V)  # it reads the strides of a bias unasked
        return lambda i: selective_state_update(states[i % copies], rows["x"], dt, A, rows["B"], rows["C"], D, dt_bias=bias)
    states = torch.zeros(copies, batch, shape.H, shape.K, shape.V, device="cuda")
    if job.impl == "fla":
        from fla.ops.gla import fused_recurrent_gla

        q, k, v, g = (rows[name][:, None] for name in ("q", "k", "v", "log_decay"))
        return lambda i: fused_recurrent_gla(q, k, v, g, scale=scale, initial_state=states[i % copies], output_final_state=True)
    from statex.kernels import gla_step, ssd_step

    if shape.op == "gla":
        return lambda i: gla_step(**rows, state=states[i % copies], scale=scale)
    return lambda i: ssd_step(**rows, state=states[i % copies])


def measure_decode(job: Job) -> Iterator[dict[str, Any]]:
    """One row a batch size: time of a token within a replayed graph."""
    import torch

    for batch in DECODE_BATCHES:
        with torch.no_grad():
            step = decoder(job, batch)
            times = timed_tokens(step, 30)
        yield row(job, "decode", batch, 1, times, None, None)
        del step
        torch.cuda.empty_cache()


def measure_rows(job: Job, started: float) -> Iterator[dict[str, Any]]:
    """Forward, then forward+backward."""
    import torch

    call, _ = implementation(job)
    batch = TOKENS // job.tokens
    sets = [inputs_of(job.shape, batch, job.tokens) for _ in range(2)]
    weights = None
    for what in ("fwd", "fwd_bwd"):
        leaves = [{name: x.detach().requires_grad_(what == "fwd_bwd") for name, x in inputs.items()} for inputs in sets]

        def run(i: int, leaves: list[dict[str, Any]] = leaves, what: str = what) -> None:
            nonlocal weights
            output = call(**leaves[i % 2])
            if what == "fwd_bwd":
                weights = torch.ones_like(output) if weights is None else weights
                output.backward(weights)
                for x in leaves[i % 2].values():
                    x.grad = None

        run(0)
        torch.cuda.synchronize()
        first = time.monotonic() - started
        run(1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(0)
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        times = timed(iter_calls(run), 20)
        yield row(job, what, batch, job.tokens, times, extra, first if times_first_result(job) else None)


def times_first_result(job: Job) -> bool:
    """Whether the time from a process's start to its first result is part of the table."""
    return job.shape.expanded and job.tokens == TOKENS


def row(
    job: Job, what: str, batch: int, tokens: int, times: list[float], extra: float | None, first: float | None
) -> dict[str, Any]:
    """One line of the table."""
    shape = job.shape
    floor = floor_ms(shape, batch, tokens, what)
    return identity(job, what, batch, tokens) | {
        "ms_median": round(statistics.median(times), 5),
        "ms_p10": round(times[len(times) // 10], 5),
        "ms_p90": round(times[-1 - len(times) // 10], 5),
        "extra_mem_mib": "" if extra is None else round(extra),
        "floor_ms": round(floor, 5),
        "first_result_s": "" if first is None else round(first, 1),
        "date": datetime.date.today().isoformat(),
    }


def identity(job: Job, what: str, batch: int, tokens: int) -> dict[str, Any]:
    """What a row measures, in the words of the table."""
    import torch
    import triton

    shape = job.shape
    return {
        "op": shape.op, "impl": f"{job.impl}-lift" if shape.lift > 1 else job.impl, "pass": what, "B": batch, "T": tokens,
        "H": shape.H, "K": shape.K, "V": shape.V, "dtype": "bf16", "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "impl_version": implementation(job)[1],
    }  # fmt: skip


def work(description: str) -> None:
    """A process's part: measures one job and prints its rows as JSON lines."""
    started = time.monotonic()
    data = json.loads(description)
    job = Job(Shape(**data["shape"]), data["impl"], data["tokens"])
    for found in measure_decode(job) if job.tokens == 0 else measure_rows(job, started):
        print("ROW " + json.dumps(found), flush=True)


def passes(job: Job) -> list[tuple[str, int, int]]:
    """(pass, batch, tokens) of the rows that a job makes."""
    if job.tokens == 0:
        return [("decode", batch, 1) for batch in DECODE_BATCHES]
    return [(what, TOKENS // job.tokens, job.tokens) for what in ("fwd", "fwd_bwd")]


def known_rows(path: Path) -> list[dict[str, str]]:
    """Rows measured before."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_known(job: Job, known: list[dict[str, str]]) -> bool:
    """Whether every row of a job is in the table."""
    have = {tuple(line[name] for name in IDENTITY) for line in known}
    try:
        wanted = [identity(job, *one) for one in passes(job)]
    except ImportError as error:
        print(f"left out: {job.impl} cannot be imported ({error})")
        return True
    return all(tuple(str(line[name]) for name in IDENTITY) in have for line in wanted)


def show(line: dict[str, Any]) -> None:
    """One measured row, readable."""
    share = float(line["floor_ms"]) / float(line["ms_median"])
    sizes = " ".join(f"{name}={line[name]}" for name in "BTHKV")
    print(
        f"{line['op']} {line['impl']:11} {line['pass']:8} {sizes:36}"
        f" {line['ms_median']:>9} ms ({line['ms_p10']} to {line['ms_p90']}),"
        f" {share:.0%} of the floor's speed, {line['extra_mem_mib'] or '-'} MiB, first result {line['first_result_s'] or '-'} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV that rows are appended to")
    parser.add_argument("--impl", type=some_of("statex", *PEERS.values()), default="statex,fla,mamba_ssm")
    parser.add_argument("--op", type=some_of(*PEERS), default="gla,ssd")
    lengths = "tokens in a sequence; batches hold 65,536 in all"
    parser.add_argument("--lengths", type=whole_numbers, default="65536,16384,4096", help=lengths)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after this time")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    require_gpu(parser)
    began = time.monotonic()
    for job in jobs(args.impl, args.op, args.lengths):
        if is_known(job, known_rows(args.out)):
            continue
        if time.monotonic() - began > args.seconds:
            print("out of time; start again to go on")
            return
        measure_in_process(job, args.out)


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """Ends with a message where there is nothing to time."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        parser.error(f"{error}: the kernels need Triton (pip install 'statex[gpu]')")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: kernels are timed on a GPU")


def measure_in_process(job: Job, out: Path) -> None:
    """Run one job and append its rows; a job that fails is reported and leaves no row.

    Where the first result is timed, the kernel cache starts empty; what it holds at the end is left to the jobs that follow.
    """
    command = [sys.executable, __file__, "--out", str(out), "--work", json.dumps(asdict(job))]
    kept = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    with tempfile.TemporaryDirectory() as empty:
        cache = empty if times_first_result(job) else kept
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if cache == empty:
            shutil.copytree(empty, kept, dirs_exist_ok=True)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    new = not out.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        show(line)
    if done.returncode:
        print(f"failed: {job}\n{done.stderr[-1500:]}", flush=True)


if __name__ == "__main__":
    main()
