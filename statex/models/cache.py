"""The recurrent cache: what a model remembers of the tokens it has read. Its size does not depend on how many they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class LayerState:
    """Memory of one layer.

    Attributes:
        recurrent: `[B, H, K, V]` fp32, sized by the layer's description; None before the first token.
        conv: last inputs of each short convolution by name, `[B, channels, conv_size - 1]` in the compute dtype.

    Without gradients a one-token step changes both in place.
    """

    __slots__ = ("conv", "recurrent")

    def __init__(self) -> None:
        self.recurrent: Tensor | None = None
        self.conv: dict[str, Tensor] = {}

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `change(tensor)`."""
        if self.recurrent is not None:
            self.recurrent = change(self.recurrent)
        self.conv = {name: change(state) for name, state in self.conv.items()}

    def copy(self) -> LayerState:
        """Another holder of the same tensors."""
        other = LayerState()
        other.recurrent, other.conv = self.recurrent, dict(self.conv)
        return other


class StatexCache(Cache):
    """One `LayerState` per layer and the number of tokens read, under the interface that `generate` expects of `past_key_values`.

    A recurrent state cannot forget its last tokens, so `crop` (assisted generation) is refused.
    """

    is_compileable = False
    layers: list[LayerState]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerState() for _ in range(num_layers)])  # type: ignore[misc]
        self.tokens_seen = 0

    def advance(self, tokens: int) -> None:
        """Count tokens that all layers have read, padding included."""
        self.tokens_seen += tokens

    @property
    def nbytes(self) -> int:
        """Bytes that all states take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All states, those of convolutions last."""
        recurrent = [layer.recurrent for layer in self.layers if layer.recurrent is not None]
        return recurrent + [state for layer in self.layers for state in layer.conv.values()]

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from sequence `beam_idx[i]` (beam search)."""
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` only."""
        self._map(lambda state: state[indices.to(state.device)])

    def branch(self, indices: Tensor) -> StatexCache:
        """A cache that goes on from the sequences `indices` (repeats allowed); what it reads does not change this one."""
        other = copy.copy(self)
        other.layers = [layer.copy() for layer in self.layers]
        other.batch_select_indices(indices)
        return other

    def put_back(self, other: StatexCache, indices: Tensor) -> None:
        """Replace the sequences `indices` by those of another cache of the same model; empty, this one becomes the other."""
        if not self.is_initialized:
            self.layers = other.layers
        else:
            for mine, theirs in zip(self.tensors, other.tensors, strict=True):
                mine[indices.to(mine.device)] = theirs.to(mine.dtype)
        self.tokens_seen = max(self.tokens_seen, other.tokens_seen)

    def reset(self) -> None:
        """Forget everything."""
        self.layers = [LayerState() for _ in self.layers]
        self.tokens_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over all tokens, past and present."""
        return self.tokens_seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token has been read."""
        return self.tokens_seen > 0

    @property
    def is_initialized(self) -> bool:
        """Whether any token has been read."""
        return self.tokens_seen > 0

    @property
    def is_croppable(self) -> bool:
        """Never."""
        return False

    @property
    def batch_size(self) -> int:
        """Number of sequences held; -1 before the first token."""
        return next((tensor.shape[0] for tensor in self.tensors), -1)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a recurrent state cannot be rolled back."""
        raise NotImplementedError("a recurrent state cannot be cropped to fewer tokens; generate without an assistant model")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: there are no keys and values to append to."""
        raise NotImplementedError("StatexCache holds recurrent states, not keys and values")


def detached_tail(sequence: Tensor, width: int) -> Tensor:
    """The last `width` steps of `[B, C, T]` in memory of their own, so that the cache does not keep the whole sequence alive."""
    return sequence[..., sequence.shape[-1] - width :].clone(memory_format=torch.contiguous_format)
