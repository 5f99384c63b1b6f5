"""Names and configs of three projects, in both directions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex.checkpoints import open_checkpoint
from statex.checkpoints.dialects import DIALECTS, dialect_of, find_dialect
from statex.errors import CheckpointError, ExportError
from statex.families import LayerDescription, ModelDescription, get_family
from tests.fixtures import GLA_CONFIG, MAMBA2_CONFIG, MAMBA_SSM_CONFIG, write_gla, write_mamba2

CONFIGS = {"fla": GLA_CONFIG, "transformers": MAMBA2_CONFIG, "mamba_ssm": MAMBA_SSM_CONFIG}


@st.composite
def models(draw: st.DrawFn, dialect: str) -> ModelDescription:
    """Any model that a dialect can name, odd options and expanded layers included."""
    source = get_family(DIALECTS[dialect].family).describe(DIALECTS[dialect].to_family(CONFIGS[dialect]), {})
    flags = [key for key, value in source.mixer.items() if isinstance(value, bool)]
    mixer = source.mixer | {key: draw(st.booleans()) for key in flags}
    lift = st.sampled_from([1, 2])
    layers = tuple(source.layers[0].replace(lift=draw(lift)) for _ in range(draw(st.integers(1, 12))))
    return ModelDescription(**{**vars(source), "mixer": mixer, "layers": layers, "tie_word_embeddings": draw(st.booleans())})


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_names_of_a_dialect_correspond_one_to_one_to_canonical_names(dialect: str, data: st.DataObject) -> None:
    model = data.draw(models(dialect))
    flags = {flag: data.draw(st.booleans()) for flag in DIALECTS[dialect].variants}
    names = list(get_family(model.family).tensors(model))
    native = [DIALECTS[dialect].to_native(name, flags) for name in names]
    assert None not in native
    assert len(set(native)) == len(names)
    recovered = DIALECTS[dialect].source_tensors({name for name in native if name is not None})
    assert {flag: recovered[flag] for flag in flags if names_use(dialect, flag, names)} == {
        flag: value for flag, value in flags.items() if names_use(dialect, flag, names)
    }
    assert [DIALECTS[dialect].to_canonical(name, flags) for name in native if name is not None] == names


def names_use(dialect: str, flag: str, names: list[str]) -> bool:
    """Whether a variant spelling concerns any of these tensors."""
    ending = DIALECTS[dialect].variants[flag][0].split("{i}")[-1]
    return any(ending in name for name in names)


def test_a_plain_spelling_beside_its_variant_is_not_a_name_of_the_dialect() -> None:
    fla, fused = DIALECTS["fla"], {"g_norm_swish_gate": True}
    assert fla.to_canonical("model.layers.0.attn.g_norm_swish_gate.weight", fused) == "model.layers.0.mixer.g_norm.weight"
    assert fla.to_canonical("model.layers.0.attn.g_norm.weight", fused) is None


@pytest.mark.parametrize(
    "name", ["model.layers.01.attn.q_proj.weight", "model.layers.x.attn.q_proj.weight", "transformer.wte.weight"]
)
def test_a_name_that_the_dialect_lacks_has_no_canonical_name(name: str) -> None:
    assert DIALECTS["fla"].to_canonical(name, {}) is None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({}, "no model_type"),
        ({"model_type": "mamba2", "dt_min": 0.001, "norm_eps": 1e-5}, "fla's own mamba2"),
        ({"d_model": 8, "ssm_cfg": {}}, "Mamba1"),
        ({"d_model": 8, "ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
    ],
)
def test_an_unsupported_config_is_refused_by_name_with_what_is_supported(config: dict, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint) as caught:
        find_dialect(config, "config.json")
    assert "gla (fla), mamba2 (transformers)" in str(caught.value)


def test_a_dialect_of_another_family_is_refused_with_the_right_ones() -> None:
    with pytest.raises(CheckpointError, match="transformers, mamba_ssm"):
        dialect_of("fla", "mamba2")


def test_ssm_cfg_that_omits_sizes_means_mamba_ssms_defaults() -> None:
    released = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}
    model = get_family("mamba2").describe(DIALECTS["mamba_ssm"].to_family(released), {})
    stock = LayerDescription(query_heads=1, key_heads=1, value_heads=24, key_dim=128, value_dim=64, scale=1.0, norm_groups=1)
    assert model.layers == (stock,) * 24
    assert (model.vocab_size, model.tie_word_embeddings, model.norm_eps) == (50288, True, 1e-5)


def test_a_wider_state_is_written_into_ssm_cfg_and_nothing_else_changes() -> None:
    source = copy.deepcopy(MAMBA_SSM_CONFIG)
    family_config = DIALECTS["mamba_ssm"].to_family(source) | {"state_size": 32}
    config = DIALECTS["mamba_ssm"].from_family(family_config, source)
    assert config == source | {"ssm_cfg": source["ssm_cfg"] | {"d_state": 32}}


@pytest.mark.parametrize("option", [{"rms_norm": False}, {"d_intermediate": 64}, {"attn_layer_idx": [1]}])
def test_state_spaces_options_that_the_family_lacks_are_refused_by_name(option: dict) -> None:
    with pytest.raises(CheckpointError, match=next(iter(option))):
        DIALECTS["mamba_ssm"].to_family(MAMBA_SSM_CONFIG | option)


def test_mamba_ssm_cannot_take_another_norm_epsilon() -> None:
    with pytest.raises(ExportError, match="layer_norm_epsilon"):
        DIALECTS["mamba_ssm"].from_family(MAMBA2_CONFIG | {"layer_norm_epsilon": 1e-6}, None)


@pytest.mark.parametrize(
    "options", [{}, {"n_groups": 2, "use_bias": True}, {"use_conv_bias": False}, {"tie_word_embeddings": True}]
)
def test_transformers_finds_every_tensor_of_our_mamba2_names_and_no_other(tmp_path: Path, options: dict) -> None:
    from transformers import Mamba2ForCausalLM

    path = write_mamba2(tmp_path / "mamba2", **options)
    model, info = Mamba2ForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    with open_checkpoint(path) as checkpoint:
        for native, value in model.state_dict().items():
            if native == "lm_head.weight" and checkpoint.description.tie_word_embeddings:
                continue
            canonical = DIALECTS["transformers"].to_canonical(native, checkpoint.source_tensors)
            assert canonical is not None
            assert torch.equal(checkpoint.load(canonical), value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_short_conv": True, "num_kv_heads": 2},
        {"fuse_norm": False},
        {"use_output_gate": False},
        {"elementwise_affine": False},
    ],
)
def test_fla_gives_its_gla_the_tensors_that_our_table_lists(tmp_path: Path, options: dict) -> None:
    gla = pytest.importorskip("fla.models.gla", exc_type=ImportError)
    with torch.device("meta"):
        model = gla.GLAForCausalLM(gla.GLAConfig(**GLA_CONFIG | options))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with open_checkpoint(write_gla(tmp_path / "gla", **options)) as checkpoint:
        ours = {DIALECTS["fla"].to_native(name, checkpoint.source_tensors): info.shape for name, info in checkpoint.tensors.items()}
    assert ours == theirs


def test_our_defaults_are_flas_defaults() -> None:
    gla = pytest.importorskip("fla.models.gla", exc_type=ImportError)
    from statex.families.gla import DEFAULTS

    config = gla.GLAConfig()
    assert {key: getattr(config, key) for key in DEFAULTS} == DEFAULTS


def test_our_defaults_are_transformers_defaults() -> None:
    from transformers import Mamba2Config

    from statex.families.mamba2 import DEFAULTS

    config = Mamba2Config()
    assert {key: getattr(config, key) for key in DEFAULTS} == DEFAULTS | {"time_step_limit": tuple(DEFAULTS["time_step_limit"])}
