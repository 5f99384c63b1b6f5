"""Generation on a GPU: one token's forward as a CUDA graph, launched at once instead of kernel by kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .cache import StatexCache

logger = logging.getLogger(__name__)


class TokenGraph:
    """Forwards of one token a row, over one cache, while `generate` runs.

    The first runs kernel by kernel, which loads all kernels; the second is captured; from then on the capture is replayed. A cache
    whose tensors are exchanged between tokens (beam search) goes on kernel by kernel.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._refused = False

    def __call__(self, forward: Callable[[Tensor], Tensor], input_ids: Tensor, cache: StatexCache) -> Tensor:
        """`forward(input_ids)`, `[B, 1] -> [B, 1, vocabulary]`, which reads and changes `cache`."""
        if self._refused or torch.is_autocast_enabled("cuda") or torch.is_grad_enabled():
            return forward(input_ids)
        if not self._warm:
            self._warm = True
            return forward(input_ids)
        tensors = cache.tensors
        if self._graph is None:
            try:
                self._capture(forward, input_ids, cache)
            except RuntimeError as error:  # a kernel that asks the host; nothing has run, so nothing is lost
                logger.warning("generating kernel by kernel, since a token's forward could not be captured: %s", error)
                self._refused = True
                return forward(input_ids)
        elif input_ids.shape != self._input_ids.shape or any(a is not b for a, b in zip(tensors, self._tensors, strict=True)):
            self._refused, self._graph = True, None
            return forward(input_ids)
        assert self._graph is not None
        self._input_ids.copy_(input_ids)
        self._graph.replay()
        cache.advance(1)
        return self._logits.clone()

    def _capture(self, forward: Callable[[Tensor], Tensor], input_ids: Tensor, cache: StatexCache) -> None:
        """Record what `forward` launches, and behind it copies of all states that it makes anew into those that it read."""
        layers, seen = cache.layers, cache.tokens_seen
        self._tensors, self._input_ids = cache.tensors, input_ids.clone()
        cache.layers = [layer.copy() for layer in layers]
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile: a data loader, a server.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = forward(self._input_ids)
                for old, new in zip(self._tensors, cache.tensors, strict=True):
                    if new is not old:
                        old.copy_(new)
        finally:
            cache.layers, cache.tokens_seen = layers, seen
        self._graph = graph


CURRENT: ContextVar[TokenGraph | None] = ContextVar("token graph of the generation under way", default=None)
"""A context variable, since threads may generate with one model side by side."""


def current_graph() -> TokenGraph | None:
    """The graph of the generation under way, if there is one. While torch.compile traces a model there is none."""
    return None if torch.compiler.is_compiling() else CURRENT.get()


def can_capture(model: nn.Module) -> bool:
    """Whether a model's forward is a sequence of launches on one GPU and nothing else: no hooks, nothing offloaded or sharded."""
    places = {parameter.device for parameter in model.parameters()}
    several = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return not (model.training or several or is_hooked(model)) and len(places) == 1 and places.pop().type == "cuda"


def is_hooked(model: nn.Module) -> bool:
    """Whether anything but the model itself sees its forward. transformers' own hook for gradient checkpointing asks nothing of a
    forward without gradients."""
    own = {handle.id for handle in getattr(model, "_require_grads_hooks", ())}
    hooks = (id for module in model.modules() for id in (*module._forward_hooks, *module._forward_pre_hooks))
    return any(id not in own for id in hooks) or any(hasattr(module, "_hf_hook") for module in model.modules())
