"""Two processes (gloo, on a CPU) train as one that holds both batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from statex.errors import RecipeError
from statex.recipes import finetune
from statex.recipes.reporting import read_log

from .helpers import write_byte_gla, write_recipe, write_widened

SCRIPT = """
import shutil, sys
from pathlib import Path
import torch.distributed as dist
from statex.recipes import finetune
checkpoint, recipe, out = sys.argv[1:]
finetune(checkpoint, recipe, None, out, device="cpu", progress=False)
if dist.get_rank() == 0:
    Path(out, "log.csv").replace(Path(out, "first.csv"))
    Path(out, "config.json").unlink()
    shutil.rmtree(Path(out, "checkpoints/step-4"))
dist.barrier()
finetune(checkpoint, out=out, resume=True, device="cpu", progress=False)
dist.destroy_process_group()
"""


def launch(*arguments: Path) -> list[subprocess.CompletedProcess[str]]:
    """Two processes as torchrun would start them, without its own start-up time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **shared, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    running = [
        subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    return [
        subprocess.CompletedProcess(command, p.returncode, stderr=told) for p in running for told in [p.communicate(timeout=300)[1]]
    ]


def test_two_processes_train_as_one_with_both_batches(tmp_path: Path) -> None:
    base = write_widened(tmp_path / "wide", write_byte_gla(tmp_path / "base"))
    # Each row holds one recall row, so that both runs see the same rows in a step; processes differ in how many labels they hold.
    data = {"mixture": [{"kind": "mqar", "num_pairs": [5, 8]}]}
    held_out = {"mixture": data["mixture"], "tokens": 64}
    shared: dict[str, Any] = {
        "data": data, "evaluation": held_out, "schedule": {"max_steps": 4}, "optimizer": {"multipliers": {"rows": 10.0}},
    }  # fmt: skip
    one = write_recipe(tmp_path / "one.yaml", **shared, training={"batch_size": 2})
    two = write_recipe(tmp_path / "two.yaml", **shared, training={"batch_size": 1})
    finetune(base, one, None, tmp_path / "alone", device="cpu", progress=False)
    for process in launch(base, two, tmp_path / "together"):
        assert process.returncode == 0, process.stderr
    alone, together, resumed = (read_log(tmp_path / name) for name in ("alone/log.csv", "together/first.csv", "together/log.csv"))
    assert [row["tokens"] for row in together[1:]] == [row["tokens"] for row in alone[1:]]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in together[1:]] == pytest.approx([row[key] for row in alone[1:]], rel=1e-4)
    (tmp_path / "together/config.json").unlink()
    with pytest.raises(RecipeError, match="started with 2 processes and is resumed with 1"):
        finetune(base, out=tmp_path / "together", resume=True, device="cpu", progress=False)
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in together[-2:]], rel=1e-6)
