"""HGRN and HGRN2 compute what models assembled here from fla's naive recurrences compute.

Tolerance: 3e-5 of the largest logit. Both run in fp32, one token by token and one by scans or chunks; seen: under 2e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statex.families import get_family
from tests.models.build import CONFIGS, build, tokens
from tests.models.test_equals_fla import rms_norm
from tests.models.test_equals_fla_delta import Weights, naive, projected

TOLERANCE = 3e-5


def gates(x: Tensor, weights: Weights, bound: Tensor) -> Tensor:
    """f of the papers, the lower bound as a plain sum."""
    return bound + (1 - bound) * torch.sigmoid(projected(x, weights, "f", activate=False))


def hgrn_layer(x: Tensor, weights: Weights, bound: Tensor, config: dict[str, Any], recurrence: Callable[..., Any]) -> Tensor:
    f = gates(x, weights, bound)
    h, _ = recurrence(projected(x, weights, "i") * (1 - f), f.log())
    normed = rms_norm(h, weights.get("g_norm.weight"), config["norm_eps"])
    return (normed * F.silu(x @ weights["g_proj.weight"].T)) @ weights["o_proj.weight"].T


def hgrn2_layer(x: Tensor, weights: Weights, bound: Tensor, config: dict[str, Any], recurrence: Callable[..., Any]) -> Tensor:
    f, width = gates(x, weights, bound), config["expand_ratio"] or config["hidden_size"] // config["num_heads"]
    parts = (projected(x, weights, "q"), 1 - f, projected(x, weights, "i", activate=False), f.log())
    o, _ = recurrence(*(part.unflatten(-1, (-1, width)) for part in parts))
    return rms_norm(o.flatten(-2), weights.get("g_norm.weight"), config["norm_eps"]) @ weights["o_proj.weight"].T


LAYERS = {"hgrn": hgrn_layer, "hgrn2": hgrn2_layer}
RECURRENCES = {"hgrn": ("ops/hgrn/naive.py", "naive_recurrent_hgrn"), "hgrn2": ("ops/gla/naive.py", "naive_recurrent_gla")}


def fla_model(ids: Tensor, state_dict: Weights, config: dict[str, Any], recurrence: Callable[..., Any]) -> Tensor:
    hidden, eps = state_dict["model.embeddings.weight"][ids], config["norm_eps"]
    bounds = torch.zeros(config["num_hidden_layers"], 1)
    if config["use_lower_bound"]:
        shares = state_dict["model.lower_bounds"].softmax(0)
        bounds = shares.cumsum(0) - shares[0]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): tensor for name, tensor in weights.items() if name.startswith("mixer.")}
        x = rms_norm(hidden, weights["mixer_norm.weight"], eps)
        hidden = hidden + LAYERS[config["model_type"]](x, mixer, bounds[index], config, recurrence)
        x = rms_norm(hidden, weights["mlp_norm.weight"], eps)
        gated = F.silu(x @ weights["mlp.gate_proj.weight"].T) * (x @ weights["mlp.up_proj.weight"].T)
        hidden = hidden + gated @ weights["mlp.down_proj.weight"].T
    return rms_norm(hidden, state_dict["model.norm.weight"], eps) @ state_dict["lm_head.weight"].T


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hgrn": ("hgrn", {"use_short_conv": False}),
    "hgrn, convolutions, twice as wide": ("hgrn", {"expand_ratio": 2}),
    "hgrn, four layers, each with bounds of its own": ("hgrn", {"num_hidden_layers": 4}),
    "hgrn, no bounds, no norm weight, tied": (
        "hgrn", {"use_lower_bound": False, "elementwise_affine": False, "tie_word_embeddings": True}
    ),
    "hgrn2": ("hgrn2", {"use_short_conv": False}),
    "hgrn2, convolutions, three layers": ("hgrn2", {"num_hidden_layers": 3}),
    "hgrn2, width from num_heads, no norm weight": ("hgrn2", {"expand_ratio": None, "num_heads": 2, "elementwise_affine": False}),
    "hgrn2, no bounds": ("hgrn2", {"use_lower_bound": False}),
    "published 1.3B layer of hgrn2": (
        "hgrn2",
        {"hidden_size": 2048, "expand_ratio": 128, "num_heads": 16, "intermediate_size": 64, "num_hidden_layers": 1,
         "use_short_conv": False, "use_lower_bound": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_a_model_around_flas_naive_recurrence(variant: str) -> None:
    family, overrides = VARIANTS[variant]
    config, recurrence = CONFIGS[family] | overrides, naive(*RECURRENCES[family])
    ours = build(get_family(family).describe(config, {}))
    ids = tokens(2, 70)
    expected = fla_model(ids, ours.state_dict(), config, recurrence)
    assert (ours(ids).logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_convolution_biases_that_fla_layers_can_have_are_used() -> None:
    description = get_family("hgrn").describe(CONFIGS["hgrn"], {})
    description.mixer["conv_bias"] = True
    ours, ids = build(description), tokens(1, 12)
    expected = fla_model(ids, ours.state_dict(), CONFIGS["hgrn"], naive(*RECURRENCES["hgrn"]))
    assert (ours(ids).logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
