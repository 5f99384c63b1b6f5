"""Peak memory of `statex expand` on random checkpoints of published shapes, beside the size of what it reads and writes.

    python benchmarks/expand_memory.py [--dtypes float32 bfloat16] [--only gla-340m] [--out benchmarks/results/expand_memory.csv]

Each run writes a random checkpoint (a process of its own), expands it by the family's default plan (another process) and reads that
process's largest resident set from the operating system. Importing torch alone takes a part of it, which is shown.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "gla-340m": {
        "model_type": "gla",
        "architectures": ["GLAForCausalLM"],
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_heads": 4,
        "expand_k": 0.5,
        "expand_v": 1.0,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    "mamba2-370m": {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "num_heads": 32,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "vocab_size": 50288,
        "tie_word_embeddings": True,
    },
}
OPERATORS = {"gla": ("merge_heads", "lift_keys"), "mamba2": ("widen_state", "lift_keys")}
MIB = 2**20


def write_random(config: dict[str, Any], dtype_name: str, out: Path) -> None:
    """A native checkpoint of that config with normal weights, tensor by tensor."""
    import torch

    from statex.checkpoints import CheckpointWriter, TensorInfo
    from statex.checkpoints.dialects import default_dialect
    from statex.families import get_family

    dialect, family = default_dialect(config["model_type"]), get_family(config["model_type"])
    variants = dialect.default_variants(config)
    shapes = {name: shape for name, (shape, _role) in family.tensors(family.describe(config, {})).items()}
    native = {str(dialect.to_native(name, variants)): TensorInfo(shape, dtype_name) for name, shape in shapes.items()}
    with CheckpointWriter(out, native) as writer:
        for name, info in native.items():
            writer.add(name, torch.randn(info.shape).mul_(0.02).to(info.torch_dtype))
        writer.finish(config)


def expand(source: Path, operator: str, out: Path) -> dict[str, Any]:
    """Expand in this process and say what it took."""
    import torch

    imported = peak_rss()
    torch.set_num_threads(1)
    from statex.surgery import expand_checkpoint

    start = time.perf_counter()
    summary = expand_checkpoint(source, out, operator=operator, progress=False)
    seconds = time.perf_counter() - start
    return {
        "torch_import_mib": imported / MIB,
        "peak_rss_mib": peak_rss() / MIB,
        "seconds": seconds,
        "state_growth": summary.state_growth,
        "new_parameters_percent": 100 * summary.new_parameters / summary.before.parameters,
        "torch": torch.__version__,
    }


def peak_rss() -> int:
    """Bytes of this process's largest resident set."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size_of(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "memory_gib": f"{memory:.0f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def stage(name: str, *arguments: str) -> dict[str, Any]:
    """Run one stage of this file in a process of its own and take its JSON. The parent stays small: a child inherits its peak."""
    command = [sys.executable, __file__, "--stage", name, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "{}")


def measure(shape: str, dtype: str) -> list[dict[str, Any]]:
    """One row for each operator that the checkpoint's family can take."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / shape, Path(folder) / "expanded"
        stage("write", shape, dtype, str(base))
        for operator in OPERATORS[SHAPES[shape]["model_type"]]:
            taken = stage("expand", str(base), operator, str(out))
            row = {
                "checkpoint": shape,
                "dtype": dtype,
                "operator": operator,
                "read_mib": f"{size_of(base) / MIB:.0f}",
                "written_mib": f"{size_of(out) / MIB:.0f}",
                **{key: f"{value:.1f}" if isinstance(value, float) else value for key, value in taken.items()},
                "peak_to_read": f"{taken['peak_rss_mib'] * MIB / size_of(base):.2f}",
            }
            rows.append(row | machine())
            print(
                f"{shape} {dtype} {operator}: reads {row['read_mib']} MiB, writes {row['written_mib']} MiB, peak resident memory "
                f"{row['peak_rss_mib']} MiB (torch alone {row['torch_import_mib']} MiB), {row['seconds']} s",
                flush=True,
            )
            shutil.rmtree(out)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "expand_memory.csv")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        name, *arguments = options.stage
        if name == "write":
            write_random(SHAPES[arguments[0]], arguments[1], Path(arguments[2]))
        else:
            print(json.dumps(expand(Path(arguments[0]), arguments[1], Path(arguments[2]))))
        return
    rows = []
    for shape in [options.only] if options.only else SHAPES:
        for dtype in options.dtypes:
            rows += measure(shape, dtype)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
