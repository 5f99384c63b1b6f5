"""Mamba-2 on a CPU: transformers' path against statex's, timed in one run.

    python benchmarks/mamba2_cpu.py [--threads N] [--repeats N] [--csv FILE]

The shape is one layer of Mamba-2 130M (hidden 768, 24 heads of 64, one group) at 2,048 tokens, batch 1, fp32, with d_state 128 (as
published) and 512. Both sides hold the same random weights (transformers' own init) and must agree before they are timed. Runs
alternate, so that whatever else the machine does hits both; medians are reported. `scan` is the recurrence alone: transformers'
`mamba2_chunk_scan` against `statex.kernels.ssd`; `layer` is the whole mixer, whose input and output projections cost both the same.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from statex.families.description import LayerDescription, ModelDescription
from statex.kernels import ssd
from statex.models.components import TokenLayout
from statex.models.mamba2 import Mamba2Mixer as OurMixer

HIDDEN, HEADS, HEAD_DIM, GROUPS, TOKENS = 768, 24, 64, 1, 2048
TARGETS = {128: 2.0, 512: 3.0}
"""The least ratio that is asked of the layer's forward pass, by d_state."""


@dataclass
class Row:
    d_state: int
    what: str
    transformers_ms: float
    statex_ms: float
    ratio: float
    largest_difference: float


def mixers(d_state: int) -> tuple[TheirMixer, OurMixer]:
    """One layer of each, with the same weights."""
    config = Mamba2Config(
        hidden_size=HIDDEN, state_size=d_state, num_heads=HEADS, head_dim=HEAD_DIM, n_groups=GROUPS, expand=2, num_hidden_layers=1
    )
    theirs = TheirMixer(config, layer_idx=0).eval()
    layer = LayerDescription(HEADS, GROUPS, HEADS, d_state, HEAD_DIM, scale=1.0, norm_groups=GROUPS)
    options = {
        "use_bias": config.use_bias, "conv_bias": config.use_conv_bias, "conv_size": config.conv_kernel,
        "time_step_limit": (0.0, None),
    }  # fmt: skip
    model = ModelDescription("mamba2", HIDDEN, 1, config.layer_norm_epsilon, False, (layer,), mixer=options)
    ours = OurMixer(model, layer).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def scans(theirs: TheirMixer, x: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]:
    """Both recurrences, and inputs as the layer makes them from `x`."""
    with torch.no_grad():
        _, xBC, dt = theirs.in_proj(x).split([theirs.intermediate_size, theirs.conv_dim, HEADS], -1)
        mixed = torch.nn.functional.silu(theirs.conv1d(xBC.mT)[..., :TOKENS].mT)
        values, B, C = mixed.split([theirs.intermediate_size, GROUPS * theirs.ssm_state_size, GROUPS * theirs.ssm_state_size], -1)
        steps = torch.nn.functional.softplus(dt + theirs.dt_bias)
    A, D = -theirs.A_log.detach().exp(), theirs.D.detach()
    inputs = (values.unflatten(-1, (HEADS, -1)), steps, B.unflatten(-1, (GROUPS, -1)), C.unflatten(-1, (GROUPS, -1)))

    def their_scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=theirs.chunk_size, D=D)

    def our_scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd(x, dt, A, B, C, D=D)[0]

    return their_scan, our_scan, tuple(t.contiguous() for t in inputs)


def forward_only(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return function(*inputs)

    return run


def forward_and_backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = tuple(x.clone().requires_grad_() for x in inputs)

    def run() -> object:
        return function(*leaves).sum().backward()

    return run


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds of each, run in turn after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    first(), second()
    for _ in range(repeats):
        for run, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


def measure(d_state: int, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    theirs, ours = mixers(d_state)
    x = torch.randn(1, TOKENS, HIDDEN)
    layout = TokenLayout()
    pairs = [("scan", *scans(theirs, x)), ("layer", theirs, lambda x: ours(x, layout), (x,))]
    rows = []
    for name, their_function, our_function, inputs in pairs:
        with torch.no_grad():
            expected, output = their_function(*inputs), our_function(*inputs)
        difference = float((output - expected).abs().max() / expected.abs().max())
        if difference > 1e-4:
            raise SystemExit(f"{name} at d_state {d_state} differs by {difference:.1e}: timings would mean nothing")
        for passes, make in (("forward", forward_only), ("forward+backward", forward_and_backward)):
            their_ms, our_ms = alternate(make(their_function, inputs), make(our_function, inputs), repeats)
            rows.append(Row(d_state, f"{name}, {passes}", their_ms, our_ms, their_ms / our_ms, difference))
    return rows


def machine() -> str:
    """Processor, threads and load: what a reader needs to place the numbers."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{load}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that torch may use")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side")
    parser.add_argument(
        "--csv", type=Path, default=Path(__file__).parent / "results/mamba2_cpu.csv", help="where to write the rows"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    environment = {
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print("\n".join(f"{name}: {value}" for name, value in environment.items()))
    print(f"Mamba-2 130M layer: hidden {HIDDEN}, {HEADS} heads of {HEAD_DIM}, {GROUPS} group, {TOKENS} tokens, batch 1, fp32\n")
    print(f"{'d_state':>7}  {'what':<24}{'transformers ms':>16}{'statex ms':>11}{'ratio':>8}{'asked':>7}{'difference':>12}")
    rows = []
    for d_state, target in TARGETS.items():
        for row in measure(d_state, arguments.repeats):
            asked = f"{target:.0f}x" if row.what == "layer, forward" else ""
            print(
                f"{row.d_state:>7}  {row.what:<24}{row.transformers_ms:>16.1f}{row.statex_ms:>11.1f}{row.ratio:>7.1f}x{asked:>7}"
                f"{row.largest_difference:>12.1e}",
                flush=True,
            )
            rows.append(row)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *environment])
        writer.writeheader()
        writer.writerows(asdict(row) | environment for row in rows)
    print(f"\nwritten to {arguments.csv}")


if __name__ == "__main__":
    main()
