"""What the states hold on real text: effective rank, occupied fraction, and how long what is stored lasts.

Everything is measured from outside, through a mixer's interface, so it means the same in every family:

- *Effective rank* of a state's matrix: exp of the entropy of its normalised singular values (Roy and Vetterli 2007).
- *Occupied fraction*: singular directions that hold 99 % of the state's energy, over min(K, V), the most that there can be.
- *Half-life*: a recurrence is linear in its initial state, so running the same text from a state S and from an empty one and taking
  the difference gives what is left of S alone. The half-life is the number of tokens after which half of its norm is left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...models.cache import LayerState
from ...models.components import Mixer, TokenLayout

ENERGY = 0.99

Mix = Callable[[Tensor, TokenLayout, LayerState], Tensor]
"""A mixer's forward."""


@dataclass(frozen=True)
class LayerMemory:
    """One layer's state, medians over texts.

    Attributes:
        effective_rank, occupied: of each head's matrix, in the order of the state's heads; where a head's state is a vector, one
            value for the matrix of all heads; none where the layer's whole state is a vector.
        rank_limit: the most that a rank can be.
        half_life: of each head, in tokens; infinite where more than half is left after `horizon` tokens.
        horizon: tokens over which decay was watched.
    """

    effective_rank: list[float]
    occupied: list[float]
    rank_limit: int
    half_life: list[float]
    horizon: int


@torch.no_grad()
def measure_memory(model: Any, mixers: list[Mixer], ids: Tensor) -> list[LayerMemory]:
    """Read texts `[N, T]` (T >= 4): the first half fills the states, the second half shows how they decay. One entry a layer."""
    found: dict[int, LayerMemory] = {}
    with _watched(mixers, found):
        model(input_ids=ids, attention_mask=None, use_cache=False, logits_to_keep=1)
    return [found[index] for index in range(len(mixers))]


@contextmanager
def _watched(mixers: list[Mixer], found: dict[int, LayerMemory]) -> Iterator[None]:
    """Measure each mixer as the model runs through it, so that no more than one layer's inputs are held."""
    with ExitStack() as stack:
        for index, mixer in enumerate(mixers):

            def measure(module: torch.nn.Module, inputs: tuple[Any, ...], more: dict[str, Any], index: int = index) -> None:
                found[index] = _measure(partial(cast(Mixer, module).forward, **more), inputs[0])

            handle = mixer.register_forward_pre_hook(measure, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _measure(mix: Mix, x: Tensor) -> LayerMemory:
    filled, horizon = x.shape[1] // 2, x.shape[1] - x.shape[1] // 2
    state = LayerState()
    mix(x[:, :filled], TokenLayout(), state)
    assert state.recurrent is not None
    ranks, shares, limit = state_ranks(state.recurrent)
    curve = retention(mix, x[:, filled:], state)
    return LayerMemory(ranks, shares, limit, [half_life(times, left) for times, left in curve], horizon)


def state_ranks(state: Tensor) -> tuple[list[float], list[float], int]:
    """Effective rank and occupied fraction by head, and the most that the rank can be, of states `[N, H, K, V]`."""
    matrices = state.flatten(3).float()
    if min(matrices.shape[2:]) == 1:
        # Vectors: one matrix of all heads, or none where a head has a single number.
        matrices = matrices.flatten(2)[:, None]
    limit = min(matrices.shape[2:])
    if limit == 1:
        return [], [], 1
    values = torch.linalg.svdvals(matrices).double()
    total = values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    shares = values / total
    ranks = torch.exp(-torch.special.xlogy(shares, shares).sum(-1))
    energy = values.square().cumsum(-1)
    needed = (energy < ENERGY * energy[..., -1:]).sum(-1) + 1
    return _medians(ranks), _medians(needed / limit), limit


def retention(mix: Mix, x: Tensor, state: LayerState) -> list[tuple[list[int], list[float]]]:
    """By head: after how many tokens of `x` `[N, T, hidden]` which share of the state's norm is left (median over texts)."""
    kept, empty = _twin(state), _twin(state)
    assert kept.recurrent is not None
    assert empty.recurrent is not None
    empty.recurrent.zero_()
    first = _norms(kept.recurrent)
    times = [2**power for power in range(x.shape[1].bit_length() - 1)] + [x.shape[1]]
    left = []
    for start, end in pairwise([0, *sorted(set(times))]):
        for each in (kept, empty):
            mix(x[:, start:end], TokenLayout(), each)
        assert kept.recurrent is not None
        left.append(_norms(kept.recurrent - empty.recurrent) / first.clamp_min(torch.finfo(first.dtype).tiny))
    by_head = torch.stack(left).median(1).values.T
    return [(sorted(set(times)), shares) for shares in by_head.tolist()]


def half_life(times: list[int], left: list[float]) -> float:
    """Tokens until half is left, from shares `left` at `times`, ascending; between two the logarithm is taken to be linear."""
    before, logs = 0.0, 0.0
    for time, share in zip(times, left, strict=True):
        log = math.log2(max(share, 1e-12))
        if log <= -1:
            return before + (time - before) * (logs + 1) / (logs - log)
        before, logs = time, log
    return math.inf


def _twin(state: LayerState) -> LayerState:
    """The same state in memory of its own: a one-token step writes in place."""
    twin = copy.copy(state)
    twin.map(torch.clone)
    return twin


def _norms(state: Tensor) -> Tensor:
    """Norm of each head `[N, H]` in fp64: what is left of a state may be a small difference."""
    return state.double().flatten(2).norm(dim=-1)


def _medians(values: Tensor) -> list[float]:
    """`[N, H] -> [H]`."""
    return np.median(values.cpu().numpy(), axis=0).tolist()
