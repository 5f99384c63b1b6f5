"""Activation checkpointing of as many layers as the GPU's memory asks for, and no more.

A checkpointed layer keeps its input alone and runs a second time in the backward pass: a quarter of a training step, which a
GPU with memory to spare need not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

MARGIN = 0.08
"""Share of a GPU's memory left alone: the allocator loses some between blocks of different sizes."""


class Memory(Protocol):
    """What has to be known of a device's memory, in bytes."""

    def allocated(self) -> int:
        """Held by tensors now."""

    def peak(self) -> int:
        """The most that tensors held since `restart`."""

    def capacity(self) -> int:
        """The most that tensors may hold."""

    def restart(self) -> None:
        """Start to look for a new peak."""


class CudaMemory:
    """The memory of a CUDA device, less what others hold of it and `MARGIN`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocated(self) -> int:
        """See `Memory`."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """See `Memory`."""
        return torch.cuda.max_memory_allocated(self.device)

    def capacity(self) -> int:
        """See `Memory`."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device) - MARGIN * total)

    def restart(self) -> None:
        """See `Memory`."""
        torch.cuda.reset_peak_memory_stats(self.device)


class FittedCheckpointing:
    """Fits the number of checkpointed layers to the memory within the first training steps, which should be of one size.

    The first step, in which optimizers allocate their states, and the second checkpoint all layers; the second measures what each
    of them makes again. Then the last layers, whose activations are the first to go, are kept as far as they fit beside the peak,
    which is measured anew until nothing is left to add.

        fitted = FittedCheckpointing(model, CudaMemory(device))
        for batch in batches:
            with fitted.step():
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Args:
        model: any of transformers' making, `statex`' own among them, with checkpointing enabled.
        memory: of its device.

    Raises:
        ValueError: `model` has no layer with checkpointing enabled.
    """

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        every = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        self.layers = [layer for layer in every if layer.gradient_checkpointing]
        if not self.layers:
            raise ValueError("enable gradient checkpointing first: no layer of the model has it")
        self.memory = memory
        self.settled = False
        self._steps = 0
        self._sizes = [0] * len(self.layers)

    @property
    def kept(self) -> int:
        """Number of layers that are not checkpointed."""
        return sum(not layer.gradient_checkpointing for layer in self.layers)

    @contextmanager
    def step(self) -> Iterator[None]:
        """To be put around each training step, from forward to optimizer."""
        if self.settled:
            yield
            return
        self.memory.restart()
        self._sizes = [0] * len(self.layers)
        with self._measured():
            yield
        self._steps += 1
        if self._steps > 1 and not self.settled:
            self._keep_more()

    def retreat(self) -> bool:
        """Checkpoint all layers for good, because memory ran out; False if all were."""
        if not self.kept:
            return False
        for layer in self.layers:
            layer.gradient_checkpointing = True
        self.settled = True
        return True

    def _keep_more(self) -> None:
        room = self.memory.capacity() - self.memory.peak()
        before = self.kept
        for layer, size in zip(reversed(self.layers), reversed(self._sizes), strict=True):
            if layer.gradient_checkpointing and size <= room:
                layer.gradient_checkpointing = False
                room -= size
        self.settled = self.kept in (before, len(self.layers))

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Notes how much each layer that is checkpointed makes again."""
        checkpoints = [layer._gradient_checkpointing_func for layer in self.layers]
        for index, (layer, checkpoint) in enumerate(zip(self.layers, checkpoints, strict=True)):
            assert callable(checkpoint)  # a plain attribute, which nn.Module's typing takes for a tensor
            layer._gradient_checkpointing_func = partial(self._measure, index, checkpoint)
        try:
            yield
        finally:
            for layer, checkpoint in zip(self.layers, checkpoints, strict=True):
                layer._gradient_checkpointing_func = checkpoint

    def _measure(self, index: int, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
        def run(*args: Any) -> Any:
            before = self.memory.allocated()
            try:
                return forward(*args)
            finally:  # the second run is left as soon as all is made again, by an exception
                self._sizes[index] = max(self._sizes[index], self.memory.allocated() - before)

        return checkpoint(run, *args)
