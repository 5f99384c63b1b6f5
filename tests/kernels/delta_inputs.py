"""Random inputs of the delta rule: normalised keys, gates of any strength, values that share keys and keys that share queries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.kernels.inputs import log_decays

HEADS: dict[str, tuple[int, int, int]] = {
    "own keys": (2, 2, 2),
    "shared keys": (2, 2, 4),
    "shared queries": (1, 4, 4),
    "both": (1, 2, 4),
}
"""Heads of queries, keys and values."""


def delta_inputs(
    tokens: int,
    decay: str | None = "mild",
    *,
    heads: str = "own keys",
    batch: int = 2,
    key_dim: int = 6,
    value_dim: int = 10,
    beta: float = 2.0,
    states: int | None = None,
) -> dict[str, Any]:
    """Arguments of `delta_rule` in float32, betas from 0 to `beta`; a decay of None is the plain rule."""
    query_heads, key_heads, value_heads = HEADS[heads]
    inputs = {
        "q": torch.randn(batch, tokens, query_heads, key_dim),
        "k": F.normalize(torch.randn(batch, tokens, key_heads, key_dim), dim=-1),
        "v": torch.randn(batch, tokens, value_heads, value_dim),
        "beta": beta * torch.rand(batch, tokens, value_heads),
        "initial_state": torch.randn(states or batch, value_heads, key_dim, value_dim),
    }
    if decay is not None:
        inputs["log_decay"] = log_decays(decay, batch, tokens, value_heads)
    return inputs
