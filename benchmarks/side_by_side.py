"""Many small training runs on one GPU: each on a stream of its own, its steps captured as a CUDA graph, all driven by one thread.

A model of a hundred thousand parameters keeps a large GPU busy for a fraction of each step; the rest is waiting for launches. A
captured step is one launch, and the graphs of several runs overlap. On a CPU the same code runs the runs in turn, without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")
Run = Callable[[], Generator[None, None, Result]]
"""Starts a run: a generator that yields after each step and returns its result."""

WARM_UP = 3
"""Steps that run as they are before one is captured: optimizer states and library handles must exist."""


class Captured:
    """A piece of work on tensors that stay where they are, `() -> None`; on a GPU captured once and then replayed."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self.work, self.eager = work, device.type != "cuda"
        self.calls, self.graph = 0, torch.cuda.CUDAGraph() if device.type == "cuda" else None

    def __call__(self) -> None:
        self.calls += 1
        if self.graph is None or self.calls <= WARM_UP:
            self.work()
            return
        if self.calls == WARM_UP + 1:
            # Capturing runs nothing; the replay below is the step.
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.work()
        self.graph.replay()


def run_side_by_side(runs: Iterable[Run[Result]], device: torch.device, at_once: int) -> Iterator[Result]:
    """Results in the order in which the runs end; `at_once` of them share the device, a step of each in turn."""
    waiting, active = iter(runs), list[tuple[torch.cuda.Stream | None, Generator[None, None, Result]]]()
    while True:
        while len(active) < at_once and (run := next(waiting, None)) is not None:
            active.append((torch.cuda.Stream(device) if device.type == "cuda" else None, run()))
        if not active:
            return
        for stream, generator in list(active):
            try:
                with torch.cuda.stream(stream):
                    next(generator)
            except StopIteration as end:
                active.remove((stream, generator))
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # the allocator keeps memory for the stream that asked for it, which is gone
                yield end.value
