"""Unexpanded GLA computes what a model assembled here from fla's `naive_recurrent_gla` computes.

Tolerance: 2e-5 of the largest logit. Both run in fp32, one token by token and one chunk by chunk; seen: under 3e-6.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statex.families import get_family
from statex.models import StatexForCausalLM
from tests.models.build import CONFIGS, build, tokens

TOLERANCE = 2e-5
PUBLISHED_340M_LAYER = {
    "hidden_size": 1024, "num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "intermediate_size": 2816, "num_hidden_layers": 1,
    "vocab_size": 64, "use_short_conv": False, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def naive_recurrent_gla() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """fla's function, without importing fla: that needs triton and registers fla's models over those of transformers."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_gla", Path(package.submodule_search_locations[0]) / "ops/gla/naive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_recurrent_gla


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight


def short_conv(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    weight = weights[f"{name}.weight"]
    y = F.conv1d(F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0)), weight, weights.get(f"{name}.bias"), groups=x.shape[-1])
    return F.silu(y.transpose(1, 2))


def fla_layer(x: Tensor, weights: dict[str, Tensor], config: dict[str, Any], recurrence: Callable[..., Any]) -> Tensor:
    heads = config["num_heads"]
    repeats = heads // (config["num_kv_heads"] or heads)
    q, k, v = (x @ weights[f"{name}_proj.weight"].T for name in "qkv")
    if config["use_short_conv"]:
        q, k, v = (short_conv(part, weights, f"{name}_conv1d") for name, part in zip("qkv", (q, k, v), strict=True))
    gates = (x @ weights["gk_proj.0.weight"].T) @ weights["gk_proj.1.weight"].T + weights["gk_proj.1.bias"]
    q, k, v, gates = (
        part.unflatten(-1, (count, -1)) for part, count in zip((q, k, v, gates), (heads, *3 * [heads // repeats]), strict=True)
    )
    k, v, gates = (part.repeat_interleave(repeats, dim=2) for part in (k, v, gates))
    log_decay = F.logsigmoid(gates) / 16
    if config["clamp_min"] is not None:
        log_decay = log_decay.clamp(min=config["clamp_min"])
    if config["feature_map"] is not None:
        q, k = (getattr(F, config["feature_map"])(part) for part in (q, k))
    o = rms_norm(recurrence(q, k, v, log_decay)[0], weights.get("g_norm.weight"), config["norm_eps"]).flatten(-2)
    if config["use_output_gate"]:
        o = o * F.silu(x @ weights["g_proj.weight"].T)
    return o @ weights["o_proj.weight"].T


def fla_model(ids: Tensor, state_dict: dict[str, Tensor], config: dict[str, Any], recurrence: Callable[..., Any]) -> Tensor:
    eps, hidden = config["norm_eps"], state_dict["model.embeddings.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): tensor for name, tensor in weights.items() if name.startswith("mixer.")}
        hidden = hidden + fla_layer(rms_norm(hidden, weights["mixer_norm.weight"], eps), mixer, config, recurrence)
        x = rms_norm(hidden, weights["mlp_norm.weight"], eps)
        gated = F.silu(x @ weights["mlp.gate_proj.weight"].T) * (x @ weights["mlp.up_proj.weight"].T)
        hidden = hidden + gated @ weights["mlp.down_proj.weight"].T
    return rms_norm(hidden, state_dict["model.norm.weight"], eps) @ state_dict["lm_head.weight"].T


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"use_short_conv": False},
    "short convolutions": {"use_short_conv": True},
    "grouped keys and values": {"num_kv_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "no gate, no norm weight": {"use_output_gate": False, "elementwise_affine": False},
    "feature map and clamp": {"feature_map": "relu", "clamp_min": -0.05},
    "published 340M layer": PUBLISHED_340M_LAYER,
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_a_model_around_fla_naive_recurrent_gla(variant: str, naive_recurrent_gla: Callable[..., Any]) -> None:
    config = CONFIGS["gla"] | VARIANTS[variant]
    ours: StatexForCausalLM = build(get_family("gla").describe(config, {}))
    ids = tokens(2, 70)
    expected = fla_model(ids, ours.state_dict(), config, naive_recurrent_gla)
    assert (ours(ids).logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_convolution_biases_that_fla_layers_can_have_are_used(naive_recurrent_gla: Callable[..., Any]) -> None:
    description = get_family("gla").describe(CONFIGS["gla"], {})
    description.mixer["conv_bias"] = True
    ours = build(description)
    ids = tokens(1, 12)
    expected = fla_model(ids, ours.state_dict(), CONFIGS["gla"], naive_recurrent_gla)
    assert (ours(ids).logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
