"""Families as data: configs describe models, descriptions give shapes, and both ways agree."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex.errors import CheckpointError, ExportError
from statex.families import FAMILIES, LayerDescription, ModelDescription, get_family


def gla(**config: Any) -> ModelDescription:
    return get_family("gla").describe(config, {})


def mamba2(**config: Any) -> ModelDescription:
    return get_family("mamba2").describe(config, {})


def shapes(model: ModelDescription, layer: int = 0) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    tensors = FAMILIES[model.family].tensors(model)
    return {name.removeprefix(prefix): shape for name, (shape, _) in tensors.items() if name.startswith(prefix)}


@st.composite
def gla_configs(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    hidden = kv_heads * groups * draw(st.sampled_from([4, 6, 8]))
    config = {
        "hidden_size": hidden,
        "num_heads": kv_heads * groups,
        "expand_k": draw(st.sampled_from([0.5, 1.0, 2])),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(1, 99)),
    }
    optional = {
        "num_kv_heads": kv_heads,
        "expand_v": 2.0,
        "intermediate_size": 24,
        "hidden_ratio": 3,
        "use_short_conv": True,
        "conv_size": 3,
        "use_output_gate": False,
        "elementwise_affine": False,
        "clamp_min": -1.5,
        "feature_map": "relu",
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "fuse_norm": False,
        "anything_else": {"kept": 1},
    }
    if groups == 1:
        optional["num_kv_heads"] = None
    chosen = draw(st.sets(st.sampled_from(sorted(optional))))
    return config | {key: optional[key] for key in chosen} | ({"num_kv_heads": kv_heads} if groups > 1 else {})


@st.composite
def mamba2_configs(draw: st.DrawFn) -> dict[str, Any]:
    groups, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    heads = 2 * groups * draw(st.integers(1, 3))
    config = {
        "num_heads": heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim // 2,
        "n_groups": groups,
        "num_hidden_layers": draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(1, 99)),
    }
    optional = {
        "state_size": 24,
        "expand": 2.0,
        "conv_kernel": 3,
        "use_bias": True,
        "use_conv_bias": False,
        "layer_norm_epsilon": 1e-6,
        "residual_in_fp32": False,
        "time_step_min": 0.01,
        "time_step_limit": [0.0, 4.0],
        "tie_word_embeddings": True,
        "chunk_size": 64,
        "anything_else": {"kept": 1},
    }
    return config | {key: optional[key] for key in draw(st.sets(st.sampled_from(sorted(optional))))}


@st.composite
def delta_net_configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    config = {
        "hidden_size": heads * draw(st.sampled_from([4, 6, 8])),
        "num_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(1, 99)),
    }
    optional = {
        "expand_k": 0.5,
        "expand_v": 2.0,
        "intermediate_size": 24,
        "hidden_ratio": 3,
        "use_gate": True,
        "use_beta": False,
        "use_short_conv": False,
        "conv_size": 3,
        "allow_neg_eigval": True,
        "qk_norm": "sum",
        "qk_activation": "elu",
        "use_output_norm": False,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "anything_else": {"kept": 1},
    }
    return config | {key: optional[key] for key in draw(st.sets(st.sampled_from(sorted(optional))))}


@st.composite
def gated_deltanet_configs(draw: st.DrawFn) -> dict[str, Any]:
    heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([6, 7, 12]))
    config = {
        "hidden_size": draw(st.sampled_from([8, 24])),
        "num_heads": heads,
        "head_dim": head_dim,
        "num_hidden_layers": draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(1, 99)),
    }
    optional = {
        "num_v_heads": heads * draw(st.integers(1, 3)),
        "expand_v": draw(st.integers(1, 30)) / head_dim,
        "intermediate_size": 24,
        "hidden_ratio": 3,
        "use_gate": False,
        "output_gate_activation": "sigmoid",
        "use_short_conv": False,
        "conv_size": 3,
        "allow_neg_eigval": True,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "anything_else": {"kept": 1},
    }
    return config | {key: optional[key] for key in draw(st.sets(st.sampled_from(sorted(optional))))}


@st.composite
def hgrn_configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    width, heads = draw(st.sampled_from([4, 6, 8])), draw(st.integers(1, 4))
    config = {
        "hidden_size": width * heads,
        "num_hidden_layers": draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(1, 99)),
    }
    sizes = [{}, {"expand_ratio": 2}, {"expand_ratio": 1.5}]
    if family == "hgrn2":
        sizes = [{"expand_ratio": width}, {"expand_ratio": width, "num_heads": heads}, {"expand_ratio": None, "num_heads": heads}]
    optional = {
        "use_lower_bound": False,
        "intermediate_size": 24,
        "hidden_ratio": 3,
        "use_short_conv": True,
        "conv_size": 3,
        "elementwise_affine": False,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attn_mode": "chunk",
        "anything_else": {"kept": 1},
    }
    chosen = draw(st.sets(st.sampled_from(sorted(optional))))
    return config | draw(st.sampled_from(sizes)) | {key: optional[key] for key in chosen}


@st.composite
def mamba_configs(draw: st.DrawFn) -> dict[str, Any]:
    hidden = draw(st.sampled_from([8, 20, 32]))
    config = {"hidden_size": hidden, "num_hidden_layers": draw(st.integers(1, 5)), "vocab_size": draw(st.integers(1, 99))}
    optional = {
        "state_size": 24,
        "expand": draw(st.sampled_from([1, 3, 1.5])),
        "conv_kernel": 3,
        "use_bias": True,
        "use_conv_bias": False,
        "time_step_rank": draw(st.sampled_from(["auto", 1, 5])),
        "layer_norm_epsilon": 1e-6,
        "residual_in_fp32": False,
        "time_step_min": 0.01,
        "tie_word_embeddings": False,
        "anything_else": {"kept": 1},
    }
    return config | {key: optional[key] for key in draw(st.sets(st.sampled_from(sorted(optional))))}


CONFIGS = {
    "gla": gla_configs(),
    "hgrn": hgrn_configs("hgrn"),
    "hgrn2": hgrn_configs("hgrn2"),
    "mamba": mamba_configs(),
    "mamba2": mamba2_configs(),
    "delta_net": delta_net_configs(),
    "gated_deltanet": gated_deltanet_configs(),
}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_native_config_of_an_unchanged_model_is_its_source_key_by_key(family: str, data: st.DataObject) -> None:
    config = data.draw(CONFIGS[family])
    model = get_family(family).describe(config, {})
    assert get_family(family).native_config(model, config) == config


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_config_written_from_nothing_describes_the_same_model_and_its_tensors(family: str, data: st.DataObject) -> None:
    model = get_family(family).describe(data.draw(CONFIGS[family]), {})
    config = get_family(family).native_config(model, {})
    found = {name: shape for name, (shape, _) in get_family(family).tensors(model).items()}
    assert get_family(family).describe(config, found) == model
    assert config["model_type"] == family


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_description_survives_json(family: str, data: st.DataObject) -> None:
    import json

    model = get_family(family).describe(data.draw(CONFIGS[family]), {})
    assert ModelDescription.from_dict(json.loads(json.dumps(model.to_dict(), allow_nan=False))) == model


def test_gla_1_3b_has_its_published_shape() -> None:
    model = gla(hidden_size=2048, num_hidden_layers=24, num_heads=4)
    assert model.intermediate_size == 5632
    assert model.layers == (LayerDescription(4, 4, 4, 256, 512, scale=256**-0.5, norm_groups=4),) * 24
    assert shapes(model)["mixer.gk_proj.1.weight"] == (1024, 16)
    assert 1.36e9 < sum(_size(shape) for shape, _ in get_family("gla").tensors(model).values()) < 1.38e9


@pytest.mark.parametrize(("hidden", "layers", "millions"), [(768, 24, 129), (1024, 48, 368), (2048, 48, 1344)])
def test_mamba2_models_have_their_published_sizes(hidden: int, layers: int, millions: int) -> None:
    model = mamba2(
        hidden_size=hidden, num_hidden_layers=layers, num_heads=hidden // 32, n_groups=1, vocab_size=50288, tie_word_embeddings=True
    )
    count = sum(_size(shape) for shape, _ in get_family("mamba2").tensors(model).values())
    assert count / 1e6 == pytest.approx(millions, abs=1)


def _size(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)


def test_merged_and_lifted_gla_layers_have_the_tensors_that_surgery_makes() -> None:
    model = gla(hidden_size=64, num_heads=8, num_kv_heads=4, num_hidden_layers=2, vocab_size=8)
    merged = model.layers[0].replace(
        query_heads=4, key_heads=2, value_heads=2, key_dim=8, value_dim=16, norm_groups=8, blocks=2, mixing="channel", lift=3
    )
    model = ModelDescription(**{**vars(model), "layers": (merged, model.layers[1])})
    source, expanded = shapes(model, 1), shapes(model, 0)
    assert expanded.pop("mixer.mixing") == (2, 8, 2)
    assert expanded.pop("mixer.lift_gamma") == (4, 2 * 8)
    assert expanded == source
    scalar = ModelDescription(**{**vars(model), "layers": (merged.replace(mixing="scalar"),)})
    assert shapes(scalar)["mixer.mixing"] == (2, 2, 2)


def test_a_norm_over_the_merged_head_is_as_wide_as_its_group() -> None:
    layer = gla(hidden_size=64, num_heads=4).layers[0]
    merged = layer.replace(query_heads=1, key_heads=1, value_heads=1, key_dim=32, value_dim=64, norm_groups=1)
    assert shapes(ModelDescription(**{**vars(gla(hidden_size=64)), "layers": (merged,)}))["mixer.g_norm.weight"] == (64,)


def test_mamba2_rows_follow_z_x_b_c_dt_for_every_group() -> None:
    model = mamba2(hidden_size=32, num_heads=8, head_dim=8, n_groups=2, state_size=16, vocab_size=8)
    found = shapes(model)
    assert found["mixer.in_proj.weight"] == (64 + 64 + 2 * 16 + 2 * 16 + 8, 32)
    assert found["mixer.conv1d.weight"] == (64 + 2 * 2 * 16, 1, 4)
    lifted = ModelDescription(**{**vars(model), "layers": (model.layers[0].replace(lift=4),)})
    assert shapes(lifted) == found | {"mixer.lift_gamma": (2, 3 * 16)}


@pytest.mark.parametrize("family", FAMILIES)
def test_decay_parameters_norms_and_biases_are_marked_as_such(family: str) -> None:
    roles = {spec.name: spec.role for spec in get_family(family).layer_tensors}
    for name, role in roles.items():
        if "norm" in name:
            assert role == "norm"
        elif any(part in name for part in ("A_log", "dt_bias", "dt_proj", "mixer.D", "gk_proj")):
            assert role == "decay"
        elif name.endswith("bias"):
            assert role == "bias"


HGRN2_WIDTHS = {
    "as in fla's default": ({"hidden_size": 512}, 4, 128),
    "expand_ratio": ({"hidden_size": 32, "expand_ratio": 8}, 4, 8),
    "num_heads where expand_ratio is null": ({"hidden_size": 32, "expand_ratio": None, "num_heads": 2}, 2, 16),
    "both": ({"hidden_size": 32, "expand_ratio": 8, "num_heads": 4}, 4, 8),
}


@pytest.mark.parametrize("case", HGRN2_WIDTHS)
def test_hgrn2_heads_are_as_wide_as_fla_makes_them(case: str) -> None:
    config, heads, width = HGRN2_WIDTHS[case]
    layer = get_family("hgrn2").describe(config, {}).layers[0]
    assert (layer.key_heads, layer.key_dim, layer.value_dim) == (heads, width, width)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"hidden_size": 512, "num_heads": 8}, r"num_heads \(8\) contradicts expand_ratio \(128\), the default, .*4 heads"),
        ({"hidden_size": 32, "expand_ratio": 8, "num_heads": 8}, r"num_heads \(8\) contradicts .*set expand_ratio to 4"),
        ({"hidden_size": 32, "expand_ratio": 8, "num_heads": 3}, r"contradicts .*Drop num_heads, .* is set$"),
        ({"hidden_size": 32, "expand_ratio": 12}, "multiple of expand_ratio"),
        ({"hidden_size": 32, "expand_ratio": None}, "neither expand_ratio nor num_heads"),
        ({"hidden_size": 32, "expand_ratio": 8, "hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 32, "expand_ratio": 8, "attn": {"layers": [1]}}, "HGRN2 layers alone"),
    ],
)
def test_an_hgrn2_config_that_contradicts_itself_is_refused(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        get_family("hgrn2").describe(config, {})


@pytest.mark.parametrize(
    ("family", "config", "millions"),
    [
        ("hgrn", {}, 1364),
        ("hgrn2", {}, 1364),
        ("mamba", {"hidden_size": 768, "num_hidden_layers": 24}, 129),
        ("mamba", {"hidden_size": 2048, "num_hidden_layers": 48}, 1372),
    ],
)
def test_models_of_hgrn_and_mamba_have_their_published_sizes(family: str, config: dict[str, Any], millions: int) -> None:
    model = get_family(family).describe(config, {})
    count = sum(_size(shape) for shape, _ in get_family(family).tensors(model).values())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_table_of_lower_bounds_is_the_models_and_no_layers() -> None:
    model = get_family("hgrn").describe({"hidden_size": 8, "expand_ratio": 2, "num_hidden_layers": 3, "vocab_size": 4}, {})
    assert get_family("hgrn").tensors(model)["model.lower_bounds"] == ((3, 16), "decay")
    unbounded = get_family("hgrn").describe({"hidden_size": 8, "use_lower_bound": False}, {})
    assert "model.lower_bounds" not in get_family("hgrn").tensors(unbounded)


def test_stock_gla_cannot_divide_gate_logits_by_anything_else() -> None:
    model = gla(hidden_size=32)
    changed = ModelDescription(**{**vars(model), "mixer": model.mixer | {"gate_logit_normalizer": 8}})
    with pytest.raises(ExportError, match="by 16, this model by 8"):
        get_family("gla").native_config(changed, {})


def test_the_gates_rank_and_conv_biases_are_taken_from_the_shapes() -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 8, "use_short_conv": True}
    found = {name: shape for name, (shape, _) in get_family("gla").tensors(gla(**config)).items()}
    found["model.layers.0.mixer.gk_proj.0.weight"] = (4, 32)
    found["model.layers.0.mixer.q_conv1d.bias"] = (16,)
    mixer = get_family("gla").describe(config, found).mixer
    assert (mixer["gate_low_rank_dim"], mixer["conv_bias"]) == (4, True)


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    with pytest.raises(CheckpointError, match=", ".join(sorted(FAMILIES))):
        get_family("rwkv9")


def test_importing_the_families_imports_no_torch() -> None:
    code = "import sys, statex.families; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
