"""Random numbers keyed by (seed, tensor name, purpose): the same whatever the shard order, the threads or the other layers do."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str, purpose: str = "") -> torch.Generator:
    """A CPU generator for one tensor.

    Args:
        seed: the plan's seed.
        name: full canonical tensor name.
        purpose: tells apart several draws into one tensor, such as the row ranges of two successive widenings: with one key for
            both, the second would draw the first one's rows again, and equal rows never part.
    """
    digest = hashlib.sha256(f"{seed}\n{name}\n{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
