"""Where the channels of keys, queries and decays lie in the tensors of a GLA layer."""

from __future__ import annotations

from ..families.description import LayerDescription

QUERIES = ("mixer.q_proj.weight", "mixer.q_conv1d.weight", "mixer.q_conv1d.bias")
"""Tensors whose first dimension runs over (query head, key channel)."""
KEYS = ("mixer.k_proj.weight", "mixer.k_conv1d.weight", "mixer.k_conv1d.bias")
"""Tensors whose first dimension runs over (key head, key channel)."""
DECAYS = ("mixer.gk_proj.1.weight", "mixer.gk_proj.1.bias")
"""Likewise: the logits of the decays, one for each channel of a key."""
MIXING = "mixer.mixing"
"""`[key heads, key channels, blocks]` where a merge mixes per channel."""


def source_heads(name: str, layer: LayerDescription) -> int:
    """How many heads a tensor's channels belong to, those inside merged heads counted one by one."""
    return (layer.query_heads if name in QUERIES else layer.key_heads) * layer.blocks
