"""`load` opens every dialect and expanded folders; from_pretrained and the Trainer's save keep what the config says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Mamba2ForCausalLM

from statex.checkpoints import CheckpointWriter, canonical_config, open_checkpoint
from statex.errors import CheckpointError, StatexError
from statex.families import get_family
from statex.models import StatexConfig, StatexForCausalLM, load
from statex.models.loading import converted
from tests.fixtures import WRITERS, write_gla, write_mamba2
from tests.models.build import DESCRIPTIONS, build, every_model, tokens

every_dialect = pytest.mark.parametrize("dialect", WRITERS)


def write_canonical(source: Path, out: Path) -> Path:
    """The same checkpoint under canonical names, as surgery writes it."""
    with open_checkpoint(source) as checkpoint, CheckpointWriter(out, checkpoint.tensors) as writer:
        for name in checkpoint.tensors:
            writer.add(name, checkpoint.load(name))
        writer.finish(canonical_config(checkpoint))
    return out


@every_model
def test_parameters_are_those_that_the_family_declares(name: str) -> None:
    description = DESCRIPTIONS[name]
    declared = {tensor: shape for tensor, (shape, _) in get_family(description.family).tensors(description).items()}
    model = StatexForCausalLM.from_description(description)
    assert {tensor: tuple(parameter.shape) for tensor, parameter in model.named_parameters()} == declared


@every_dialect
@torch.no_grad()
def test_native_and_canonical_folders_give_the_same_logits_by_load_and_auto_model(dialect: str, tmp_path: Path) -> None:
    native = WRITERS[dialect](tmp_path / "native")
    canonical = write_canonical(native, tmp_path / "canonical")
    ids = tokens(2, 9) % 40
    logits = load(native)(ids).logits
    assert load(canonical)(ids).logits.equal(logits)
    assert AutoModelForCausalLM.from_pretrained(canonical).eval()(ids).logits.equal(logits)


@torch.no_grad()
def test_load_of_a_native_mamba2_folder_equals_transformers(tmp_path: Path) -> None:
    native = write_mamba2(tmp_path / "native")
    ids = tokens(2, 9)
    expected = Mamba2ForCausalLM.from_pretrained(native).eval()(ids).logits
    assert (load(native)(ids).logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_weights_keep_their_stored_dtype_or_take_the_one_asked_for_and_decays_stay_fp32(tmp_path: Path) -> None:
    native = write_mamba2(tmp_path / "native", dtype=torch.bfloat16)
    for model in (load(native), load(native, dtype=torch.float16)):
        dtypes = {name.rpartition("mixer.")[2]: parameter.dtype for name, parameter in model.named_parameters()}
        assert {dtypes[name] for name in ("A_log", "dt_bias", "D")} == {torch.float32}
        assert dtypes["in_proj.weight"] == (model.dtype if model.dtype != torch.float32 else None)
    assert load(native).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in load(native, dtype=torch.float32).parameters()} == {torch.float32}
    auto = AutoModelForCausalLM.from_pretrained(write_canonical(native, tmp_path / "canonical"))
    assert [p.dtype for p in auto.parameters()] == [p.dtype for p in load(native).parameters()]


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("float64", torch.float64), ("auto", torch.float16)])
def test_load_takes_dtypes_by_name_and_auto_is_the_stored_one(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    assert load(write_gla(tmp_path / "native", dtype=torch.float16), dtype=dtype).dtype == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": torch.int8}, r"torch\.int8 is not a dtype to compute in.*float32"),
        ({"dtype": "half a float"}, "'half a float' is not a dtype to compute in"),
        ({"device": "gpu"}, r"the device cannot be used.*\(gpu\)"),
    ],
)
def test_load_refuses_dtypes_and_devices_that_are_none(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    native = write_gla(tmp_path / "native")
    with pytest.raises(StatexError, match=told):
        load(native, **options)


@pytest.mark.parametrize("name", ["mamba2", "gla-expanded"])
@torch.no_grad()
def test_a_converted_model_is_a_copy_that_equals_one_loaded_so(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    model, ids = load(tmp_path), tokens(1, 9)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    copied, expected = converted(model, dtype=torch.bfloat16), load(tmp_path, dtype="bfloat16")
    assert [weight.dtype for weight in copied.parameters()] == [weight.dtype for weight in expected.parameters()]
    assert copied(ids).logits.equal(expected(ids).logits)
    assert all(tensor.equal(before[key]) and tensor.dtype == before[key].dtype for key, tensor in model.state_dict().items())
    own = {weight.data_ptr() for weight in model.parameters()}
    assert own.isdisjoint(weight.data_ptr() for weight in copied.parameters())


def test_a_model_that_is_as_asked_is_not_copied() -> None:
    model = build("gla")
    assert converted(model, dtype=torch.float32, device=torch.device("cpu")) is model
    half = converted(model, dtype=torch.bfloat16)
    assert converted(half, dtype=torch.bfloat16) is half


def test_load_draws_no_random_numbers_and_leaves_a_model_in_evaluation_mode(tmp_path: Path) -> None:
    native = write_gla(tmp_path / "native")
    before = torch.get_rng_state()
    assert not load(native).training
    assert torch.get_rng_state().equal(before)


def test_load_takes_the_generation_config_and_the_backend(tmp_path: Path) -> None:
    native = write_gla(tmp_path / "native")
    (native / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    model = load(native, backend="reference")
    assert model.generation_config.eos_token_id == 7
    assert {block.mixer.backend for block in model.model.layers} == {"reference"}
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        load(native, backend="fast")


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_a_tensor_that_does_not_fit_the_config_is_named(damage: str, tmp_path: Path) -> None:
    native = write_gla(tmp_path / "native")
    tensors = load_file(native / "model.safetensors")
    name = "model.layers.1.attn.k_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        name = "model.layers.1.attn.mixing"
        tensors[name] = torch.ones(2)
    else:
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, native / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(native)


@every_model
@torch.no_grad()
def test_save_pretrained_and_from_pretrained_keep_logits_config_and_tying(name: str, tmp_path: Path) -> None:
    model, ids = build(name), tokens(2, 9)
    model.config.statex["provenance"] = {"new": ["a"], "expanded": [], "limit": float("inf")}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, StatexForCausalLM)
    assert again(ids).logits.equal(model(ids).logits)
    assert again.config.statex == model.config.statex
    assert again.config.description == DESCRIPTIONS[name]
    tied = again.lm_head.weight is again.model.embeddings.weight
    assert tied == DESCRIPTIONS[name].tie_word_embeddings
    assert load(tmp_path)(ids).logits.equal(model(ids).logits)


def test_auto_classes_know_statex(tmp_path: Path) -> None:
    model = build("gla")
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), StatexConfig)
    ids = tokens(1, 4)
    backbone = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_config_follows_the_description_and_keeps_the_family_keys() -> None:
    keys: dict[str, Any] = {"num_heads": 4, "expand_k": 0.5, "eos_token_id": 2, "vocab_size": 3}
    config = StatexConfig.from_description(DESCRIPTIONS["gla"], **keys)
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (32, 48, 2)
    assert (config.num_heads, config.expand_k, config.eos_token_id) == (4, 0.5, 2)
    config.description = replace(config.description, vocab_size=50)
    assert config.vocab_size == 50
    with pytest.raises(ValueError, match="no `statex` block"):
        _ = StatexConfig().description


def test_new_tokens_enter_the_description_and_survive_saving(tmp_path: Path) -> None:
    model = build("gla-grouped")
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path)
    assert load(tmp_path)(tokens(1, 4)).logits.shape[-1] == 60


@torch.no_grad()
def test_a_tensor_that_a_checkpoint_lacks_starts_as_the_identity_under_from_pretrained(tmp_path: Path) -> None:
    model = build("gla-expanded")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lacking = [name for name in tensors if name.endswith(("mixing", "lift_gamma", "q_conv1d.bias"))]
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in lacking},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    again = StatexForCausalLM.from_pretrained(tmp_path)
    mixer = again.model.layers[0].mixer
    rows = mixer.mixing.shape[1] // mixer.mixing.shape[2]
    assert mixer.mixing[0].equal(torch.eye(mixer.mixing.shape[2]).repeat_interleave(rows, dim=0))
    assert not mixer.lift_gamma.any()
    kept = {name: tensor for name, tensor in again.state_dict().items() if name not in lacking}
    assert all(tensor.equal(tensors[name]) for name, tensor in kept.items() if name in tensors)


@every_model
def test_equal_seeds_draw_equal_weights_and_other_seeds_do_not(name: str) -> None:
    first, same, other = (StatexForCausalLM.from_description(DESCRIPTIONS[name], seed) for seed in (1, 1, 2))
    pairs = dict(zip(first.state_dict(), zip(first.state_dict().values(), same.state_dict().values(), strict=True), strict=True))
    assert all(left.equal(right) for left, right in pairs.values())
    assert not first.model.embeddings.weight.equal(other.model.embeddings.weight)
    assert all(parameter.isfinite().all() for parameter in first.parameters())


def test_weights_are_drawn_by_the_inits_of_the_family() -> None:
    mixer = StatexForCausalLM.from_description(DESCRIPTIONS["mamba2"]).model.layers[0].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((steps > 0.0009) & (steps < 0.11)).all()
    assert ((mixer.A_log >= 0) & (mixer.A_log <= torch.tensor(16.0).log())).all()
    assert mixer.D.eq(1).all()
