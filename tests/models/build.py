"""Tiny models of all families with every parameter random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from statex.families import ModelDescription, get_family
from statex.models import StatexForCausalLM
from tests.fixtures import (
    DELTA_NET_CONFIG,
    GATED_DELTANET_CONFIG,
    GLA_CONFIG,
    HGRN2_CONFIG,
    HGRN_CONFIG,
    MAMBA2_CONFIG,
    MAMBA_CONFIG,
    random_tensor,
)

VOCABULARY = GLA_CONFIG["vocab_size"]
CONFIGS = {
    "gla": GLA_CONFIG | {"num_hidden_layers": 2, "use_short_conv": True},
    "mamba2": MAMBA2_CONFIG | {"num_hidden_layers": 2},
    "hgrn": HGRN_CONFIG | {"num_hidden_layers": 2, "use_short_conv": True},
    "hgrn2": HGRN2_CONFIG | {"num_hidden_layers": 2, "use_short_conv": True},
    "mamba": MAMBA_CONFIG | {"num_hidden_layers": 2},
    "delta_net": DELTA_NET_CONFIG | {"num_hidden_layers": 2, "use_gate": True},
    "gated_deltanet": GATED_DELTANET_CONFIG | {"num_hidden_layers": 2, "num_heads": 2, "num_v_heads": 4},
}


def describe(family: str, **overrides: Any) -> ModelDescription:
    """Description of a tiny model; config keys by name."""
    return get_family(family).describe(CONFIGS[family] | overrides, {})


def expanded(family: str) -> ModelDescription:
    """A description with all that surgery can add, in layers that differ from each other."""
    model = describe(family)
    first, second = model.layers
    if family == "gla":
        heads = first.query_heads
        sizes = {"key_dim": heads * first.key_dim, "value_dim": heads * first.value_dim}
        first = replace(first, query_heads=1, key_heads=1, value_heads=1, **sizes, blocks=heads, mixing="channel", lift=2)
        first, second = replace(first, spectrum="learned"), replace(second, lift=3, spectrum="fixed")
    elif family in ("delta_net", "gated_deltanet"):
        heads = first.key_heads
        sizes = {"query_heads": 1, "key_heads": 1, "key_dim": heads * first.key_dim, "blocks": heads}
        first = replace(first, **sizes, mixing="channel", lift=2, spectrum="learned")
        second = replace(second, lift=3, spectrum="fixed")
    elif family == "hgrn":
        heads = {"query_heads": 4, "key_heads": 4, "value_heads": 4, "key_dim": 8, "value_dim": 8, "scale": 8**-0.5}
        first, second = replace(first, **heads, outer="added", lift=2), replace(second, **heads, outer="alone")
    elif family == "hgrn2":
        sizes = {"query_heads": 2, "key_heads": 2, "value_heads": 2, "key_dim": 16, "value_dim": 16}
        first = replace(first, **sizes, blocks=2, mixing="channel", lift=2)
        second = replace(second, lift=3, spectrum="learned")
    elif family == "mamba":
        first, second = replace(first, key_dim=3 * first.key_dim, spectrum="learned"), replace(second, lift=2, spectrum="fixed")
    else:
        first, second = replace(first, key_dim=3 * first.key_dim, spectrum="learned"), replace(second, lift=2, spectrum="fixed")
    return replace(model, layers=(first, second))


DESCRIPTIONS = {
    "gla": describe("gla"),
    "gla-grouped": describe(
        "gla", num_kv_heads=2, use_short_conv=False, feature_map="relu", clamp_min=-0.3, tie_word_embeddings=True
    ),
    "gla-expanded": expanded("gla"),
    "hgrn": describe("hgrn"),
    "hgrn-bare": describe("hgrn", use_short_conv=False, use_lower_bound=False, expand_ratio=2, tie_word_embeddings=True),
    "hgrn-expanded": expanded("hgrn"),
    "hgrn2": describe("hgrn2", elementwise_affine=False),
    "hgrn2-expanded": expanded("hgrn2"),
    "mamba": describe("mamba"),
    "mamba-biased": describe("mamba", use_bias=True, use_conv_bias=False, residual_in_fp32=False, tie_word_embeddings=True),
    "mamba-expanded": expanded("mamba"),
    "delta_net": describe("delta_net"),
    "delta_net-bare": describe("delta_net", use_short_conv=False, use_beta=False, qk_norm="sum", qk_activation="elu"),
    "delta_net-expanded": expanded("delta_net"),
    "gated_deltanet": describe("gated_deltanet", tie_word_embeddings=True),
    "gated_deltanet-expanded": expanded("gated_deltanet"),
    "mamba2": describe("mamba2", n_groups=2),
    "mamba2-biased": describe(
        "mamba2", use_bias=True, time_step_limit=[0.05, 0.2], residual_in_fp32=False, tie_word_embeddings=True
    ),
    "mamba2-expanded": expanded("mamba2"),
}

every_model = pytest.mark.parametrize("name", DESCRIPTIONS)
"""Runs a test on each description above, by name."""


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter at random, those too that inits set to 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape), generator))
    return model


def build(description: ModelDescription | str) -> StatexForCausalLM:
    """A model in evaluation mode with random parameters."""
    model = StatexForCausalLM.from_description(DESCRIPTIONS[description] if isinstance(description, str) else description)
    randomise(model)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, VOCABULARY, shape)
