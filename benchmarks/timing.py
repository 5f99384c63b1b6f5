"""What drivers time calls on a GPU with, and name what they timed by.

torch is imported where it is used: what a process needs to its first result, imports included, is timed too.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

BANDWIDTH = 3.0e12
"""Bytes a second of the floors."""
DECODE_BATCHES = (1, 8, 64)
DECODE_TOKENS = 16
"""Tokens in a captured graph."""


def version(*names: str) -> str:
    """Version of the first of these distributions that is installed; of a bare folder, its `__version__`."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(__import__(names[0].replace("-", "_")), "__version__", "unknown"))


def iter_calls(run: Callable[[int], None]) -> Callable[[], None]:
    """Calls `run` with 0, 1, 2, ..."""
    state = {"i": 0}

    def call() -> None:
        run(state["i"])
        state["i"] += 1

    return call


def timed(call: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of `count` calls after three to warm up."""
    import torch

    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)


def timed_tokens(step: Callable[[int], Any], count: int) -> list[float]:
    """Milliseconds of a token within a graph of several that is replayed `count` times; `step` does one on the i-th state."""
    import torch

    for i in range(3):
        step(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(DECODE_TOKENS):
            step(i)
    return [ms / DECODE_TOKENS for ms in timed(graph.replay, count)]
