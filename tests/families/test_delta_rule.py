"""DeltaNet and Gated DeltaNet as data: published sizes, grouped values, and configs that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from statex.errors import CheckpointError, ExportError
from statex.families import ModelDescription, draw, get_family


def describe(family: str, **config: Any) -> ModelDescription:
    return get_family(family).describe(config, {})


def sizes(model: ModelDescription) -> dict[str, int]:
    return {name: math.prod(shape) for name, (shape, _) in get_family(model.family).tensors(model).items()}


def test_delta_net_1_3b_has_its_published_size() -> None:
    model = describe("delta_net")
    assert model.layers[0].state_shape == (16, 128, 128)
    assert 1.36e9 < sum(sizes(model).values()) < 1.37e9


@pytest.mark.parametrize(("use_gate", "head_dim"), [(True, 256), (False, 256)])
def test_a_gated_deltanet_mixer_has_as_many_parameters_as_its_paper_says(use_gate: bool, head_dim: int) -> None:
    """6 · hidden² with an output gate and keys of 0.75 · hidden channels, or without one and keys of hidden channels."""
    model = describe("gated_deltanet", use_gate=use_gate, num_heads=6 if use_gate else 8, head_dim=head_dim)
    mixer = sum(size for name, size in sizes(model).items() if name.startswith("model.layers.0.mixer."))
    assert mixer == pytest.approx(6 * 2048**2, rel=0.01)


@pytest.mark.parametrize("key_dim", range(1, 400, 7))
def test_expand_v_survives_flas_rounding_down(key_dim: int) -> None:
    """fla takes int(head_dim * expand_v); a quotient that is a hair too small would lose a channel."""
    model = describe("gated_deltanet", hidden_size=16, num_heads=1, head_dim=key_dim, expand_v=1.0, num_hidden_layers=1)
    for value_dim in (1, 3, 49, 100, 333):
        layer = model.layers[0].replace(value_dim=value_dim)
        config = get_family("gated_deltanet").native_config(ModelDescription(**{**vars(model), "layers": (layer,)}), {})
        assert int(key_dim * config["expand_v"]) == value_dim


@pytest.mark.parametrize(("mixing", "rows"), [("scalar", 2), ("channel", 16)])
def test_a_drawn_mixing_writes_every_value_under_its_own_key(mixing: str, rows: int) -> None:
    model = describe("gated_deltanet", hidden_size=32, num_heads=4, num_v_heads=12, head_dim=8, num_hidden_layers=1)
    layer = model.layers[0].replace(query_heads=2, key_heads=2, key_dim=16, blocks=2, mixing=mixing)
    spec = next(spec for spec in get_family("gated_deltanet").layer_tensors if spec.name == "mixer.mixing")
    assert spec.shape(model, layer) == (2, rows, 2, 3)
    drawn = draw(spec.init, spec.shape(model, layer), model=model)
    for block in range(2):
        own = slice(block * rows // 2, (block + 1) * rows // 2)
        assert bool((drawn[:, own, block] == 1).all())
    assert float(drawn.sum()) == 2 * rows * 3


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads do not divide": ("delta_net", {"num_heads": 3}, "multiple of num_heads"),
    "unknown norm": ("delta_net", {"qk_norm": "rms"}, "Supported: l2, sum"),
    "unknown activation": ("delta_net", {"qk_activation": "gelu"}, "qk_activation 'gelu'"),
    "attention layers": ("delta_net", {"attn": {"layers": [1]}}, "DeltaNet layers alone"),
    "flag that is none": ("delta_net", {"allow_neg_eigval": 2}, "allow_neg_eigval must be true or false"),
    "shared values": ("gated_deltanet", {"num_v_heads": 3}, r"num_v_heads \(3\) must be a multiple of num_heads \(6\)"),
    "half a channel": ("gated_deltanet", {"head_dim": 5, "expand_v": 0.5}, r"head_dim \* expand_v must be a positive whole number"),
    "unknown gate": ("gated_deltanet", {"output_gate_activation": "tanh"}, "Supported: swish, silu, sigmoid"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_config_that_cannot_be_is_refused_by_key(mistake: str) -> None:
    family, config, message = MISTAKES[mistake]
    with pytest.raises(CheckpointError, match=message):
        describe(family, **config)


DISAGREEMENTS: dict[str, tuple[str, str, tuple[int, ...], str]] = {
    "keys": ("delta_net", "mixer.k_proj.weight", (8, 32), "hidden_size * expand_k means 32"),
    "betas": ("delta_net", "mixer.b_proj.weight", (2, 32), "num_heads means 4"),
    "taps": ("delta_net", "mixer.q_conv1d.weight", (32, 1, 3), "conv_size means 4"),
    "value heads": ("gated_deltanet", "mixer.A_log", (2,), "num_v_heads means 4"),
    "values": ("gated_deltanet", "mixer.v_proj.weight", (8, 32), "num_v_heads * head_dim * expand_v means 64"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_config_and_shapes_that_disagree_are_both_named(case: str) -> None:
    family, tensor, shape, said = DISAGREEMENTS[case]
    config: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    config |= {"head_dim": 8, "expand_v": 2.0} if family == "gated_deltanet" else {}
    shapes = {name: shape for name, (shape, _) in get_family(family).tensors(describe(family, **config)).items()}
    assert get_family(family).describe(config, shapes) == describe(family, **config)
    with pytest.raises(CheckpointError, match=tensor) as caught:
        get_family(family).describe(config, shapes | {f"model.layers.0.{tensor}": shape})
    assert said in str(caught.value)


def test_stock_delta_net_cannot_group_values() -> None:
    model = describe("delta_net", hidden_size=32, num_heads=4, num_hidden_layers=1)
    layer = model.layers[0].replace(query_heads=2, key_heads=2)
    with pytest.raises(ExportError, match="4 value heads and 2 key heads"):
        get_family("delta_net").native_config(ModelDescription(**{**vars(model), "layers": (layer,)}), {})
