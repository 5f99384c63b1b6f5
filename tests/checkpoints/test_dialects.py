"""Names and configs of three projects, in both directions."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Mamba2Config, MambaConfig

from statex.checkpoints import open_checkpoint
from statex.checkpoints.dialects import DIALECTS, Dialect, dialect_of, find_dialect
from statex.errors import CheckpointError, ExportError
from statex.families import LayerDescription, ModelDescription, get_family
from tests.fixtures import (
    DELTA_NET_CONFIG,
    GATED_DELTANET_CONFIG,
    GLA_CONFIG,
    HGRN2_CONFIG,
    HGRN_CONFIG,
    MAMBA1_SSM_CONFIG,
    MAMBA2_CONFIG,
    MAMBA_CONFIG,
    MAMBA_SSM_CONFIG,
    WRITERS,
    write_mamba,
    write_mamba2,
)

FLA, STATE_SPACES = dialect_of("fla", "gla"), dialect_of("mamba_ssm", "mamba2")
CONFIGS = {
    ("gla", "fla"): GLA_CONFIG,
    ("hgrn", "fla"): HGRN_CONFIG,
    ("hgrn2", "fla"): HGRN2_CONFIG,
    ("mamba", "transformers"): MAMBA_CONFIG,
    ("mamba", "mamba_ssm"): MAMBA1_SSM_CONFIG,
    ("delta_net", "fla"): DELTA_NET_CONFIG,
    ("gated_deltanet", "fla"): GATED_DELTANET_CONFIG,
    ("mamba2", "transformers"): MAMBA2_CONFIG,
    ("mamba2", "mamba_ssm"): MAMBA_SSM_CONFIG,
}


@st.composite
def models(draw: st.DrawFn, dialect: Dialect) -> ModelDescription:
    """Any model that a dialect can name, odd options and expanded layers included."""
    source = get_family(dialect.family).describe(dialect.to_family(CONFIGS[dialect.family, dialect.name]), {})
    flags = [key for key, value in source.mixer.items() if isinstance(value, bool)]
    mixer = source.mixer | {key: draw(st.booleans()) for key in flags}
    lift = st.sampled_from([1, 2])
    layers = tuple(source.layers[0].replace(lift=draw(lift)) for _ in range(draw(st.integers(1, 12))))
    return ModelDescription(**{**vars(source), "mixer": mixer, "layers": layers, "tie_word_embeddings": draw(st.booleans())})


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: f"{dialect.family} ({dialect.name})")
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_names_of_a_dialect_correspond_one_to_one_to_canonical_names(dialect: Dialect, data: st.DataObject) -> None:
    model = data.draw(models(dialect))
    flags = {flag: data.draw(st.booleans()) for flag in dialect.variants}
    names = list(get_family(model.family).tensors(model))
    native = [dialect.to_native(name, flags) for name in names]
    assert None not in native
    assert len(set(native)) == len(names)
    recovered = dialect.source_tensors({name for name in native if name is not None})
    assert {flag: recovered[flag] for flag in flags if names_use(dialect, flag, names)} == {
        flag: value for flag, value in flags.items() if names_use(dialect, flag, names)
    }
    assert [dialect.to_canonical(name, flags) for name in native if name is not None] == names


def names_use(dialect: Dialect, flag: str, names: list[str]) -> bool:
    """Whether a variant spelling concerns any of these tensors."""
    ending = dialect.variants[flag][0].split("{i}")[-1]
    return any(ending in name for name in names)


def test_a_plain_spelling_beside_its_variant_is_not_a_name_of_the_dialect() -> None:
    fused = {"g_norm_swish_gate": True}
    assert FLA.to_canonical("model.layers.0.attn.g_norm_swish_gate.weight", fused) == "model.layers.0.mixer.g_norm.weight"
    assert FLA.to_canonical("model.layers.0.attn.g_norm.weight", fused) is None


@pytest.mark.parametrize(
    "name", ["model.layers.01.attn.q_proj.weight", "model.layers.x.attn.q_proj.weight", "transformer.wte.weight"]
)
def test_a_name_that_the_dialect_lacks_has_no_canonical_name(name: str) -> None:
    assert FLA.to_canonical(name, {}) is None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({}, "no model_type"),
        ({"model_type": "mamba2", "dt_min": 0.001, "norm_eps": 1e-5}, "fla's own mamba2"),
        ({"model_type": "mamba", "dt_min": 0.001, "norm_eps": 1e-5}, "fla's own mamba "),
        ({"d_model": 8, "ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
    ],
)
def test_an_unsupported_config_is_refused_by_name_with_what_is_supported(config: dict, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint) as caught:
        find_dialect(config, "config.json")
    assert all(f"{dialect.family} ({dialect.name})" in str(caught.value) for dialect in DIALECTS)


def test_a_dialect_of_another_family_is_refused_with_the_right_ones() -> None:
    with pytest.raises(CheckpointError, match="transformers, mamba_ssm"):
        dialect_of("fla", "mamba2")


def test_ssm_cfg_that_omits_sizes_means_mamba_ssms_defaults() -> None:
    released = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}
    model = get_family("mamba2").describe(STATE_SPACES.to_family(released), {})
    stock = LayerDescription(query_heads=1, key_heads=1, value_heads=24, key_dim=128, value_dim=64, scale=1.0, norm_groups=1)
    assert model.layers == (stock,) * 24
    assert (model.vocab_size, model.tie_word_embeddings, model.norm_eps) == (50288, True, 1e-5)


def test_a_wider_state_is_written_into_ssm_cfg_and_nothing_else_changes() -> None:
    source = copy.deepcopy(MAMBA_SSM_CONFIG)
    family_config = STATE_SPACES.to_family(source) | {"state_size": 32}
    config = STATE_SPACES.from_family(family_config, source)
    assert config == source | {"ssm_cfg": source["ssm_cfg"] | {"d_state": 32}}


@pytest.mark.parametrize("option", [{"rms_norm": False}, {"d_intermediate": 64}, {"attn_layer_idx": [1]}])
def test_state_spaces_options_that_the_family_lacks_are_refused_by_name(option: dict) -> None:
    with pytest.raises(CheckpointError, match=next(iter(option))):
        STATE_SPACES.to_family(MAMBA_SSM_CONFIG | option)


def test_mamba_ssm_cannot_take_another_norm_epsilon() -> None:
    with pytest.raises(ExportError, match="layer_norm_epsilon"):
        STATE_SPACES.from_family(MAMBA2_CONFIG | {"layer_norm_epsilon": 1e-6}, None)


def test_a_mamba_config_that_transformers_made_of_state_spaces_is_transformers() -> None:
    """The released `-hf` folders keep keys of both."""
    config = MAMBA_CONFIG | {"ssm_cfg": {}, "d_model": 32, "n_layer": 3, "rms_norm": True}
    dialect = find_dialect(config, "config.json")
    assert (dialect.family, dialect.name) == ("mamba", "transformers")


@pytest.mark.parametrize("ssm_cfg", [{}, {"layer": "Mamba1"}], ids=str)
def test_state_spaces_configs_that_name_no_layer_mean_mamba_1_and_its_defaults(ssm_cfg: dict) -> None:
    released = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": ssm_cfg, "rms_norm": True}
    dialect = find_dialect(released, "config.json")
    model = get_family(dialect.family).describe(dialect.to_family(released), {})
    stock = LayerDescription(query_heads=1, key_heads=1, value_heads=1, key_dim=16, value_dim=1536, scale=1.0, norm_groups=1)
    assert model.layers == (stock,) * 24
    assert (model.vocab_size, model.mixer["time_step_rank"], model.tie_word_embeddings) == (50280, 48, True)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mamba2", {}),
        ("mamba2", {"n_groups": 2, "use_bias": True}),
        ("mamba2", {"use_conv_bias": False}),
        ("mamba2", {"tie_word_embeddings": True}),
        ("mamba", {}),
        ("mamba", {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True}),
    ],
)
def test_transformers_finds_every_tensor_of_our_mamba_names_and_no_other(tmp_path: Path, family: str, options: dict) -> None:
    from transformers import Mamba2ForCausalLM, MambaForCausalLM

    write, theirs = {"mamba2": (write_mamba2, Mamba2ForCausalLM), "mamba": (write_mamba, MambaForCausalLM)}[family]
    path = write(tmp_path / family, **options)
    model, info = theirs.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    with open_checkpoint(path) as checkpoint:
        for native, value in model.state_dict().items():
            if native == "lm_head.weight" and checkpoint.description.tie_word_embeddings:
                continue
            canonical = dialect_of("transformers", family).to_canonical(native, checkpoint.source_tensors)
            assert canonical is not None
            assert torch.equal(checkpoint.load(canonical), value)


FLAS_CLASSES = {"gla": "GLA", "hgrn": "HGRN", "hgrn2": "HGRN2", "delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet"}


def flas(family: str, kind: str) -> Any:
    """fla's `Config` or `ForCausalLM` of a family."""
    package = pytest.importorskip(f"fla.models.{family}", exc_type=ImportError)
    return getattr(package, FLAS_CLASSES[family] + kind)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gla", {}),
        ("gla", {"use_short_conv": True, "num_kv_heads": 2}),
        ("gla", {"fuse_norm": False}),
        ("gla", {"use_output_gate": False}),
        ("gla", {"elementwise_affine": False}),
        ("hgrn", {}),
        ("hgrn", {"expand_ratio": 2, "use_short_conv": True}),
        ("hgrn", {"use_lower_bound": False, "elementwise_affine": False}),
        ("hgrn2", {}),
        ("hgrn2", {"use_short_conv": True, "elementwise_affine": False}),
        ("hgrn2", {"expand_ratio": None, "num_heads": 2}),
        ("delta_net", {}),
        ("delta_net", {"use_gate": True, "use_beta": False, "use_short_conv": False, "expand_k": 0.5}),
        ("gated_deltanet", {}),
        ("gated_deltanet", {"num_v_heads": 8, "use_gate": False, "use_short_conv": False}),
    ],
)
def test_fla_gives_its_models_the_tensors_that_our_table_lists(tmp_path: Path, family: str, options: dict) -> None:
    with torch.device("meta"):
        model = flas(family, "ForCausalLM")(flas(family, "Config")(**CONFIGS[family, "fla"] | options))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    dialect = dialect_of("fla", family)
    with open_checkpoint(WRITERS[f"{family} (fla)"](tmp_path / family, **options)) as checkpoint:
        ours = {dialect.to_native(name, checkpoint.source_tensors): info.shape for name, info in checkpoint.tensors.items()}
    assert ours == theirs


@pytest.mark.parametrize("family", FLAS_CLASSES)
def test_our_defaults_are_flas_defaults(family: str) -> None:
    config, defaults = flas(family, "Config")(), import_module(f"statex.families.{family}").DEFAULTS
    assert {key: getattr(config, key) for key in defaults} == defaults


@pytest.mark.parametrize("family", ["mamba2", "mamba"])
def test_our_defaults_are_transformers_defaults(family: str) -> None:
    # By name: with fla imported, the Auto classes mean its own.
    config = {"mamba2": Mamba2Config, "mamba": MambaConfig}[family]()
    defaults = dict(import_module(f"statex.families.{family}").DEFAULTS)
    if family == "mamba2":
        defaults["time_step_limit"] = tuple(defaults["time_step_limit"])
    if family == "mamba":  # transformers works out what auto means at once
        defaults["time_step_rank"] = 48
    assert {key: getattr(config, key) for key in defaults} == defaults
