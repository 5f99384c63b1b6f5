"""Bad input: one message that says what, where and what to do, and nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from statex.checkpoints import canonical_config, open_checkpoint
from statex.errors import CheckpointError
from tests.fixtures import write_gla, write_mamba2, write_mamba_ssm


def refusal(path: str | Path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def edit_config(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return path


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "no such folder" in message
    assert str(tmp_path / "nowhere") in message


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    assert "a checkpoint is a folder" in refusal(path / "model.safetensors")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub does not give it" in refusal("nobody/nothing-of-the-kind")


def test_a_folder_without_config(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    (path / "config.json").unlink()
    assert "config.json" in refusal(path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = write_gla(tmp_path / "ckpt")
    (path / "config.json").write_text(text)
    assert "JSON" in refusal(path)


def test_a_folder_without_weights_says_which_files_were_expected(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    (path / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refusal(path)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_safetensors_file(tmp_path: Path, kept: int) -> None:
    path = write_gla(tmp_path / "ckpt")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:kept])
    message = refusal(path)
    assert "truncated" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("kept", [0, 100, -1, -5000])
def test_a_truncated_bin(tmp_path: Path, kept: int) -> None:
    path = write_mamba_ssm(tmp_path / "ckpt")
    data = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(data[:kept])
    assert "truncated" in refusal(path)


def test_a_bin_with_pickle_code_is_refused_and_its_code_never_runs(tmp_path: Path) -> None:
    path, proof = write_mamba_ssm(tmp_path / "ckpt"), tmp_path / "code-ran"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (proof,)

    torch.save({"weight": Code()}, path / "pytorch_model.bin")
    assert "pickle code" in refusal(path)
    assert not proof.exists()


def test_a_bin_that_holds_something_else_than_tensors(tmp_path: Path) -> None:
    path = write_mamba_ssm(tmp_path / "ckpt")
    torch.save({"model": {}, "step": 3}, path / "pytorch_model.bin")
    assert "table of tensors" in refusal(path)


def test_an_index_that_names_absent_shards_lists_them(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    names = {"lm_head.weight": "model-00001-of-00002.safetensors", "model.norm.weight": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "1 shard(s) that are not there: model-00002-of-00002.safetensors" in refusal(path)


def test_an_index_that_puts_a_tensor_into_the_wrong_shard(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    (path / "model.safetensors").rename(path / "a.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"nothing.weight": "a.safetensors"}}))
    assert "nothing.weight is in a.safetensors, and it is not" in refusal(path)


@pytest.mark.parametrize("table", [{}, {"weight_map": {}}, {"weight_map": {"a": "../b.safetensors"}}])
def test_an_index_without_a_usable_table(tmp_path: Path, table: dict) -> None:
    path = write_gla(tmp_path / "ckpt")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(table))
    assert "weight_map" in refusal(path)


def test_an_unsupported_family(tmp_path: Path) -> None:
    message = refusal(edit_config(write_gla(tmp_path / "ckpt"), model_type="llama"))
    assert "'llama' is not supported" in message
    assert str(tmp_path / "ckpt") in message


@pytest.mark.parametrize(
    ("changes", "both_sides"),
    [
        ({"num_hidden_layers": 4}, ["num_hidden_layers is 4", "layers 0 to 2"]),
        ({"hidden_size": 64}, ["hidden_size means 64", "model.embeddings.weight has shape [48, 32]"]),
        ({"vocab_size": 64}, ["vocab_size means 64", "[48, 32]"]),
        ({"expand_k": 1.0}, ["hidden_size * expand_k means 32", "model.layers.0.attn.q_proj.weight has shape [16, 32]"]),
        ({"expand_v": 2.0}, ["hidden_size * expand_v means 64", "o_proj.weight has shape [32, 32]"]),
        ({"num_heads": 2}, ["num_heads (2) means 16", "model.layers.0.attn.g_norm_swish_gate.weight has shape [8]"]),
        ({"num_kv_heads": 2}, ["(2/4) means 8", "k_proj.weight has shape [16, 32]"]),
        ({"intermediate_size": 64}, ["intermediate_size means 64", "[48, 32]"]),
        ({"use_short_conv": True}, ["missing tensors", "(9)", "model.layers.0.attn.k_conv1d.weight"]),
        ({"use_output_gate": False}, ["does not mention (3)", "model.layers.0.attn.g_proj.weight"]),
    ],
)
def test_a_gla_config_that_disagrees_with_the_tensors_is_refused_with_both_sides(
    tmp_path: Path, changes: dict, both_sides: list[str]
) -> None:
    message = refusal(edit_config(write_gla(tmp_path / "ckpt"), **changes))
    assert "config.json and the tensors disagree" in message
    assert all(side in message for side in both_sides), message


@pytest.mark.parametrize(
    ("changes", "both_sides"),
    [
        ({"state_size": 16}, ["n_groups (1) * state_size (16) means 96", "conv1d.weight has shape [80, 1, 4]"]),
        ({"n_groups": 2}, ["n_groups (2) * state_size (8) means 96", "conv1d.weight has shape [80, 1, 4]"]),
        ({"num_heads": 4, "head_dim": 16}, ["num_heads means 4", "A_log has shape [8]"]),
        ({"conv_kernel": 3}, ["conv_kernel means 3", "[80, 1, 4]"]),
        ({"use_bias": True}, ["missing tensors", "(6)", "in_proj.bias"]),
        (
            {"tie_word_embeddings": False, "vocab_size": 40},
            ["vocab_size means 40", "backbone.embeddings.weight has shape [48, 32]"],
        ),
    ],
)
def test_a_mamba2_config_that_disagrees_with_the_tensors_is_refused_with_both_sides(
    tmp_path: Path, changes: dict, both_sides: list[str]
) -> None:
    message = refusal(edit_config(write_mamba2(tmp_path / "ckpt"), **changes))
    assert "config.json and the tensors disagree" in message
    assert all(side in message for side in both_sides), message


def test_a_single_wrong_layer_is_found(tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.2.attn.q_proj.weight"
        tensors[name] = tensors[name][:-4].clone()

    message = refusal(edit_tensors(write_gla(tmp_path / "ckpt"), narrow))
    assert "gives model.layers.2.attn.q_proj.weight the shape [16, 32], and the file has [12, 32]" in message


def test_a_missing_head_of_an_untied_model(tmp_path: Path) -> None:
    message = refusal(edit_tensors(write_gla(tmp_path / "ckpt"), lambda tensors: tensors.pop("lm_head.weight")))
    assert "missing tensors that config.json asks for (1): lm_head.weight" in message


@pytest.mark.parametrize("name", ["model.layers.0.attn.rotary.weight", "model.layers.0.mixer.D", "adapter.weight"])
def test_tensors_that_the_dialect_does_not_have_are_not_dropped_silently(tmp_path: Path, name: str) -> None:
    message = refusal(edit_tensors(write_gla(tmp_path / "ckpt"), lambda tensors: tensors.update({name: torch.ones(2)})))
    assert f"does not mention (1): {name}" in message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_heads": 3}, "num_heads (3)"),
        ({"num_kv_heads": 3}, "num_kv_heads (3)"),
        ({"num_heads": "four"}, "num_heads must be a positive whole number, not 'four'"),
        ({"expand_k": 0.33}, "hidden_size * expand_k must be a positive whole number, not 10.56"),
        ({"norm_eps": "small"}, "norm_eps must be a number"),
        ({"use_short_conv": 1}, "use_short_conv must be true or false"),
        ({"hidden_act": "powlu"}, "'powlu'"),
        ({"feature_map": "elu1"}, "'elu1'"),
        ({"attn": {"layers": [1]}}, "attention layers (`attn`)"),
        ({"attnres_block_size": 4}, "attnres_block_size"),
    ],
)
def test_a_gla_config_that_we_do_not_support_is_refused_by_its_key(tmp_path: Path, changes: dict, complaint: str) -> None:
    assert complaint in refusal(edit_config(write_gla(tmp_path / "ckpt"), **changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_heads": 7}, "num_heads * head_dim (7 * 8 = 56)"),
        ({"n_groups": 3}, "multiple of n_groups (3)"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"time_step_limit": 0.5}, "time_step_limit must be two numbers"),
    ],
)
def test_a_mamba2_config_that_we_do_not_support_is_refused_by_its_key(tmp_path: Path, changes: dict, complaint: str) -> None:
    assert complaint in refusal(edit_config(write_mamba2(tmp_path / "ckpt"), **changes))


def test_state_spaces_files_of_another_d_state_than_their_config_says(tmp_path: Path) -> None:
    path = write_mamba_ssm(tmp_path / "ckpt")
    config = json.loads((path / "config.json").read_text())
    del config["ssm_cfg"]["d_state"]
    (path / "config.json").write_text(json.dumps(config))
    message = refusal(path)
    assert "state_size (128)" in message
    assert "[80, 1, 4]" in message


@pytest.mark.parametrize(("method", "name"), [("gptq", "GPTQ"), ("awq", "AWQ"), ("bitsandbytes", "bitsandbytes"), ("fp8", "fp8")])
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(tmp_path: Path, method: str, name: str) -> None:
    message = refusal(edit_config(write_gla(tmp_path / "ckpt"), quantization_config={"quant_method": method}))
    assert f"quantised ({name})" in message


@pytest.mark.parametrize(
    ("tensor", "value", "name"),
    [
        ("model.layers.0.attn.q_proj.qweight", torch.ones(4, dtype=torch.int32), "GPTQ or AWQ"),
        ("model.layers.0.attn.q_proj.SCB", torch.ones(4), "bitsandbytes"),
        ("model.layers.0.attn.q_proj.weight", torch.ones(16, 32).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_quantised_tensors_are_refused_without_a_config_that_says_so(
    tmp_path: Path, tensor: str, value: torch.Tensor, name: str
) -> None:
    message = refusal(edit_tensors(write_gla(tmp_path / "ckpt"), lambda tensors: tensors.update({tensor: value})))
    assert f"quantised ({name})" in message


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        (..., "no `statex` block"),
        ({"version": 1}, "no `statex` block with a description"),
        ({"version": 2, "description": {}}, "version 2"),
        ({"version": 1, "description": {"family": "gla"}}, "layer descriptions cannot be read"),
    ],
)
def test_a_canonical_config_that_is_broken(tmp_path: Path, block: Any, complaint: str) -> None:
    assert complaint in refusal(edit_config(write_gla(tmp_path / "ckpt"), model_type="statex", statex=block))


def test_a_canonical_description_without_the_familys_options(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    config = canonical_config(open_checkpoint(path))
    config["statex"]["description"]["mixer"] = {}
    (path / "config.json").write_text(json.dumps(config))
    assert "layer descriptions cannot be read" in refusal(path)
