"""How the processes of `recovery.py` share its runs: a folder of claims, a file for each run that somebody has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recovery_runs import Spec

CLOSED = "closed"
RESTARTS = 3
"""Times that the process of a device is started again after it died."""


@dataclass
class Queue:
    """Runs to do, handed out one at a time; several processes share them through a folder of claims."""

    specs: list[Spec]
    claims: Path
    worker: str
    deadline: float
    step_seconds: float
    length: Callable[[Spec], int]
    """Steps of a run."""
    retries: set[Spec] = field(default_factory=set)
    pace: dict[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Spec]:
        return self

    def __next__(self) -> Spec:
        """The first run that nobody has and that ends in time. Later there may be one again: another may have failed."""
        for spec in list(self.specs):
            if time.time() + self.seconds(spec) > self.deadline:
                continue
            self.specs.remove(spec)
            if spec in self.retries or self._claim(spec):
                return spec
        raise StopIteration

    def _claim(self, spec: Spec) -> bool:
        try:
            with (self.claims / spec.name).open("x") as file:
                file.write(self.worker)
        except FileExistsError:
            return False
        return True

    def seconds(self, spec: Spec) -> float:
        """Wall-clock that a run will take, by what earlier ones of this process took."""
        return self.length(spec) * self.pace.get(spec.base, max([*self.pace.values(), self.step_seconds]))

    def done(self, spec: Spec, seconds: float) -> None:
        """Learn from a run that ended well, and keep it from being done again should this process die."""
        if self.length(spec):
            self.pace[spec.base] = seconds / self.length(spec)
        self.close(spec)

    def close(self, spec: Spec) -> None:
        """Nobody is to take this run again."""
        (self.claims / spec.name).write_text(CLOSED)

    def again(self, spec: Spec) -> bool:
        """Put a failed run back; False where it has failed before."""
        if spec in self.retries:
            return False
        self.retries.add(spec)
        self.specs.insert(0, spec)
        return True


def work_on_devices(devices: list[str], deadline: float) -> None:
    """This command again in a process for each entry of `devices`, each started again when it dies."""
    # Killed like this, it takes its processes along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    with tempfile.TemporaryDirectory() as claims:

        def start(worker: int) -> subprocess.Popen[bytes]:
            number = int(devices[worker])
            chosen = {"CUDA_VISIBLE_DEVICES": visible[number] if visible != [""] else str(number)}
            own = ["--worker", str(worker), "--claims", claims, "--deadline", str(deadline)]
            own += ["--eager"] if restarts[worker] > 1 else []  # it may be the graphs that it dies of
            return subprocess.Popen([sys.executable, *sys.argv, *own], env=os.environ | chosen)

        restarts = dict.fromkeys(range(len(devices)), 0)
        active = {worker: start(worker) for worker in restarts}
        failed = False
        try:
            while active:
                time.sleep(0.2)
                for worker, process in list(active.items()):
                    if process.poll() is None:
                        continue
                    del active[worker]
                    failed = failed or process.returncode != 0
                    if process.returncode and time.time() < deadline and restarts[worker] < RESTARTS:
                        restarts[worker] += 1
                        print(
                            f"the process of device {devices[worker]} ended with {process.returncode}; again",
                            file=sys.stderr,
                            flush=True,
                        )
                        release(Path(claims), str(worker))
                        active[worker] = start(worker)
        finally:
            for process in active.values():
                process.terminate()
    if failed:
        raise SystemExit("a process died; what it had done is in the CSV")


def release(claims: Path, worker: str) -> None:
    """Give back the runs that a process had not ended when it died."""
    for claim in claims.iterdir():
        if claim.read_text() == worker:
            claim.unlink()
