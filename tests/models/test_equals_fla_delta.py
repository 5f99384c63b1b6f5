"""DeltaNet and Gated DeltaNet compute what models assembled here from fla's naive recurrences compute.

Tolerance: 3e-5 of the largest logit. Both run in fp32, one token by token and one chunk by chunk; seen: under 1e-5.
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
from tests.fixtures import DELTA_NET_CONFIG, GATED_DELTANET_CONFIG
from tests.models.build import build, tokens
from tests.models.test_equals_fla import rms_norm

TOLERANCE = 3e-5
Weights = dict[str, Tensor]


def naive(path: str, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """One function of fla, without importing fla: that needs triton and registers fla's models over those of transformers."""
    pytest.importorskip("einops")
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive", Path(package.submodule_search_locations[0]) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., tuple[Tensor, Tensor | None]] = getattr(module, name)
    return found


def projected(x: Tensor, weights: Weights, part: str, activate: bool = True) -> Tensor:
    """The projection to q, k or v, convolved over time where there are taps, then SiLU."""
    y = x @ weights[f"{part}_proj.weight"].T
    taps = weights.get(f"{part}_conv1d.weight")
    if taps is not None:
        padded = F.pad(y.transpose(1, 2), (taps.shape[-1] - 1, 0))
        y = F.conv1d(padded, taps, weights.get(f"{part}_conv1d.bias"), groups=y.shape[-1]).transpose(1, 2)
    return F.silu(y) if activate else y


def unit(x: Tensor, norm: str = "l2") -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if norm == "l2" else F.normalize(x, p=1, dim=-1, eps=1e-6)


def output(o: Tensor, x: Tensor, weights: Weights, config: dict[str, Any], gate: Callable[[Tensor], Tensor]) -> Tensor:
    o = rms_norm(o, weights["o_norm.weight"], config["norm_eps"]).flatten(-2)
    if config["use_gate"]:
        o = o * gate(x @ weights["g_proj.weight"].T)
    return o @ weights["o_proj.weight"].T


def delta_net_layer(x: Tensor, weights: Weights, config: dict[str, Any]) -> Tensor:
    recurrence = naive("ops/delta_rule/naive.py", "delta_rule_recurrence")
    heads, activation = config["num_heads"], config["qk_activation"]
    act = {"silu": lambda y: y, "identity": lambda y: y, "relu": F.relu, "elu": lambda y: F.elu(y) + 1}[activation]
    q, k = (act(projected(x, weights, part, activation == "silu")).unflatten(-1, (heads, -1)) for part in "qk")
    v = projected(x, weights, "v").unflatten(-1, (heads, -1))
    beta = torch.sigmoid(x @ weights["b_proj.weight"].T) if config["use_beta"] else torch.ones_like(q[..., 0])
    beta = 2 * beta if config["allow_neg_eigval"] else beta
    rows = (unit(q, config["qk_norm"]), unit(k, config["qk_norm"]), v, beta)
    o, _ = recurrence(*(row.transpose(1, 2) for row in rows))
    return output(o.transpose(1, 2), x, weights, config, F.silu)


def gated_deltanet_layer(x: Tensor, weights: Weights, config: dict[str, Any]) -> Tensor:
    recurrence = naive("ops/gated_delta_rule/naive.py", "naive_recurrent_gated_delta_rule")
    heads = config["num_heads"]
    value_heads = config["num_v_heads"] or heads
    q, k = (unit(projected(x, weights, part).unflatten(-1, (heads, -1))) for part in "qk")
    q, k = (y.repeat_interleave(value_heads // heads, 2) for y in (q, k))
    v = projected(x, weights, "v").unflatten(-1, (value_heads, -1))
    beta = torch.sigmoid(x @ weights["b_proj.weight"].T) * (2 if config["allow_neg_eigval"] else 1)
    g = -weights["A_log"].exp() * F.softplus(x @ weights["a_proj.weight"].T + weights["dt_bias"])
    o, _ = recurrence(q, k, v, beta, g)
    return output(
        o, x, weights, config, {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}[config["output_gate_activation"]]
    )


LAYERS = {"delta_net": delta_net_layer, "gated_deltanet": gated_deltanet_layer}


def fla_model(ids: Tensor, state_dict: Weights, config: dict[str, Any]) -> Tensor:
    eps, hidden = config["norm_eps"], state_dict["model.embeddings.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): tensor for name, tensor in weights.items() if name.startswith("mixer.")}
        hidden = hidden + LAYERS[config["model_type"]](rms_norm(hidden, weights["mixer_norm.weight"], eps), mixer, config)
        x = rms_norm(hidden, weights["mlp_norm.weight"], eps)
        gated = F.silu(x @ weights["mlp.gate_proj.weight"].T) * (x @ weights["mlp.up_proj.weight"].T)
        hidden = hidden + gated @ weights["mlp.down_proj.weight"].T
    return rms_norm(hidden, state_dict["model.norm.weight"], eps) @ state_dict["lm_head.weight"].T


PUBLISHED_1_3B_LAYER = {
    "hidden_size": 2048, "num_heads": 16, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64
}  # fmt: skip
LONG_KEYS = {"num_hidden_layers": 1, "num_heads": 1, "head_dim": 320, "expand_v": 0.1}
DELTA_NET: dict[str, dict[str, Any]] = {
    "plain": {},
    "no convolution": {"use_short_conv": False},
    "output gate, tied": {"use_gate": True, "tie_word_embeddings": True},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "beta 1, other widths": {"use_beta": False, "expand_k": 0.5, "expand_v": 2.0},
    "no beta, negative eigenvalues": {"use_beta": False, "allow_neg_eigval": True},
    "keys that sum to 1, elu": {"qk_norm": "sum", "qk_activation": "elu"},
    "relu, no convolution": {"qk_activation": "relu", "use_short_conv": False},
    "identity": {"qk_activation": "identity"},
    "published 1.3B layer": PUBLISHED_1_3B_LAYER,
}
GATED_DELTANET: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped values": {"num_heads": 2, "num_v_heads": 6},
    "no convolution, no gate": {"use_short_conv": False, "use_gate": False},
    "negative eigenvalues, sigmoid gate": {"allow_neg_eigval": True, "output_gate_activation": "sigmoid"},
    "tied, silu": {"tie_word_embeddings": True, "output_gate_activation": "silu", "expand_v": 2.0},
    "keys beyond 256": LONG_KEYS,
}
VARIANTS = [
    pytest.param(base | {"num_hidden_layers": 2} | variant, id=f"{base['model_type']}, {name}")
    for base, variants in ((DELTA_NET_CONFIG, DELTA_NET), (GATED_DELTANET_CONFIG, GATED_DELTANET))
    for name, variant in variants.items()
]


@pytest.mark.parametrize("config", VARIANTS)
@torch.no_grad()
def test_logits_equal_a_model_around_flas_naive_recurrence(config: dict[str, Any]) -> None:
    ours = build(get_family(config["model_type"]).describe(config, {}))
    ids = tokens(2, 70)
    expected = fla_model(ids, ours.state_dict(), config)
    assert (ours(ids).logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("config", [DELTA_NET_CONFIG, GATED_DELTANET_CONFIG], ids=lambda config: config["model_type"])
@torch.no_grad()
def test_convolution_biases_that_fla_layers_can_have_are_used(config: dict[str, Any]) -> None:
    description = get_family(config["model_type"]).describe(config, {})
    description.mixer["conv_bias"] = True
    ours, ids = build(description), tokens(1, 12)
    expected = fla_model(ids, ours.state_dict(), config)
    assert (ours(ids).logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
