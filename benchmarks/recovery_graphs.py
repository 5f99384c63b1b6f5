"""The gradients of a step of `recovery.py`: the replay of a CUDA graph for each shape of batch."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from recovery_extras import divergence
from torch import Tensor
from torch.nn import functional as F

from statex.evals.mqar_rows import IGNORE
from statex.models import StatexForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from pretrain_tiny import logits

WARM_UP = 2
"""Passes in front of a capture: gradients, library handles and workspaces must exist."""


class Backward:
    """Adds the gradients of a batch's loss to `.grad`, `(ids, labels) -> None`; on a GPU the replay of a graph for each shape.

    Everything happens on the stream that is current when a run begins, so that no two runs share a workspace of the libraries. The
    graphs of a run share their memory; nothing but gradients outlives a replay.
    """

    def __init__(self, loss: Any, device: torch.device, eager: bool) -> None:
        self.loss, self.eager = loss, eager or device.type != "cuda"
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.pool = None if self.eager else torch.cuda.graph_pool_handle()

    def capture(self, ids: Tensor, labels: Tensor) -> None:
        """Record the work on batches of this shape; leaves something in the gradients."""
        if self.eager or ids.shape in self.graphs:
            return
        ids, labels = ids.clone(), labels.clone()
        for _ in range(WARM_UP):
            self.loss(ids, labels).backward()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        gc.disable()  # what it would free belongs to other runs, and may not be freed while this one is captured
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                self.loss(ids, labels).backward()
        finally:
            gc.enable()
        self.graphs[ids.shape] = graph, ids, labels

    def __call__(self, ids: Tensor, labels: Tensor) -> None:
        if self.eager:
            self.loss(ids, labels).backward()
            return
        graph, static_ids, static_labels = self.graphs[ids.shape]
        static_ids.copy_(ids)
        static_labels.copy_(labels)
        graph.replay()


def batch_loss(
    model: StatexForCausalLM, teacher: StatexForCausalLM | None, weight: float, text: torch.Size, ids: Tensor, labels: Tensor
) -> Tensor:
    """Mean nats an answer, and on batches of the shape `text` `weight` times the divergence from the teacher."""
    predicted = logits(model, ids)[:, :-1]
    loss = F.cross_entropy(predicted.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
    if teacher is None or ids.shape != text:
        return loss
    with torch.no_grad():
        known = logits(teacher, ids)[:, :-1]
    return loss + weight * divergence(predicted, known)
