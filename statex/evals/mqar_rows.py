"""Multi-query associative recall (MQAR, arXiv 2312.04927): rows of key-value pairs followed by queries, drawn as token ids.

The evaluation task and the synthetic training documents of a recipe draw from here, with different seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORE = -100
"""Label of a position that no loss or score counts (torch's cross-entropy convention)."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this file needs."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Pools:
    """Disjoint token ids from which keys `[num_keys]` and values `[num_values]` are drawn."""

    keys: np.ndarray
    values: np.ndarray


def token_pools(tokenizer: Tokenizer, limit: int = 4096) -> Pools:
    """Split a vocabulary into keys (its upper half) and values (its lower half), at most `limit` ids each.

    With a byte tokenizer the keys are the bytes from 0x80, which English text does not hold, so that nothing learnt from text
    answers a query. Larger vocabularies are thinned evenly.
    """
    special = set(tokenizer.all_special_ids)
    ids = np.array([i for i in range(len(tokenizer)) if i not in special])
    lower, upper = np.array_split(ids, 2)
    return Pools(keys=_thin(upper, limit), values=_thin(lower, limit))


def draw_row(pools: Pools, num_pairs: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One row `k1 v1 … kn vn` and then all n pairs again in another order, as (ids `[4n]`, labels `[4n]`).

    Keys are distinct, values are not. Labels hold the value at its own position in the second half (transformers shifts them) and
    `IGNORE` elsewhere.

    Raises:
        ValueError: more pairs than the pool has keys.
    """
    if num_pairs > len(pools.keys):
        raise ValueError(f"{num_pairs} pairs need as many distinct keys, the vocabulary gives {len(pools.keys)}")
    pairs = np.stack([rng.permutation(pools.keys)[:num_pairs], rng.choice(pools.values, num_pairs)], axis=1)
    ids = np.concatenate([pairs, rng.permutation(pairs)]).reshape(-1)
    labels = np.full_like(ids, IGNORE)
    labels[2 * num_pairs + 1 :: 2] = ids[2 * num_pairs + 1 :: 2]
    return ids, labels


def _thin(pool: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` ids, evenly spread."""
    return pool[np.linspace(0, len(pool) - 1, min(limit, len(pool))).round().astype(int)]
