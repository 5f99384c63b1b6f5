"""Tiny models of both families with every parameter random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from statex.families import ModelDescription, get_family
from statex.models import StatexForCausalLM
from tests.fixtures import GLA_CONFIG, MAMBA2_CONFIG, random_tensor

VOCABULARY = GLA_CONFIG["vocab_size"]
CONFIGS = {"gla": GLA_CONFIG | {"num_hidden_layers": 2, "use_short_conv": True}, "mamba2": MAMBA2_CONFIG | {"num_hidden_layers": 2}}


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
        second = replace(second, lift=3)
    else:
        first, second = replace(first, key_dim=3 * first.key_dim), replace(second, lift=2)
    return replace(model, layers=(first, second))


DESCRIPTIONS = {
    "gla": describe("gla"),
    "gla-grouped": describe(
        "gla", num_kv_heads=2, use_short_conv=False, feature_map="relu", clamp_min=-0.3, tie_word_embeddings=True
    ),
    "gla-expanded": expanded("gla"),
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
