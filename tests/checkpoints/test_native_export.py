"""Export to stock checkpoints: lossless where nothing changed, exact where the model grew, a precise refusal elsewhere."""

from __future__ import annotations

import errno
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from statex.checkpoints import Checkpoint, CheckpointWriter, TensorInfo, canonical_config, export_native, open_checkpoint
from statex.errors import CheckpointError, ExportError
from statex.families import LayerDescription, ModelDescription
from tests.fixtures import (
    WRITERS,
    random_tensor,
    write_delta_net,
    write_gated_deltanet,
    write_gla,
    write_hgrn,
    write_hgrn2,
    write_mamba,
    write_mamba1_ssm,
    write_mamba2,
    write_mamba_ssm,
)

SOURCES: dict[str, Callable[[Path], Path]] = {
    "gla": lambda path: write_gla(path, dtype=torch.bfloat16),
    "gla, plain norm, tied, shared heads": lambda path: write_gla(
        path, fuse_norm=False, tie_word_embeddings=True, num_kv_heads=2, use_short_conv=True, conv_bias=True
    ),
    "gla without output gate": lambda path: write_gla(path, dtype=torch.float16, use_output_gate=False),
    "delta_net": lambda path: write_delta_net(path, dtype=torch.bfloat16),
    "delta_net, gate, no beta, odd norms, negative eigenvalues": lambda path: write_delta_net(
        path, use_gate=True, use_beta=False, qk_norm="sum", qk_activation="elu", allow_neg_eigval=True, conv_bias=True
    ),
    "gated_deltanet, tied": lambda path: write_gated_deltanet(path, tie_word_embeddings=True),
    "gated_deltanet, grouped values, negative eigenvalues": lambda path: write_gated_deltanet(
        path, dtype=torch.float16, num_heads=2, num_v_heads=6, use_short_conv=False, allow_neg_eigval=True
    ),
    "hgrn": lambda path: write_hgrn(path, dtype=torch.bfloat16),
    "hgrn, wide, convolutions, tied": lambda path: write_hgrn(
        path, expand_ratio=2, use_short_conv=True, conv_bias=True, tie_word_embeddings=True
    ),
    "hgrn2": lambda path: write_hgrn2(path, dtype=torch.bfloat16, use_short_conv=True),
    "hgrn2, num_heads, no bounds, no norm weight": lambda path: write_hgrn2(
        path, expand_ratio=None, use_lower_bound=False, elementwise_affine=False
    ),
    "mamba": lambda path: write_mamba(path, dtype=torch.bfloat16),
    "mamba, biases, auto rank, tied": lambda path: write_mamba(
        path, use_bias=True, use_conv_bias=False, time_step_rank="auto", tie_word_embeddings=True
    ),
    "state-spaces' mamba": lambda path: write_mamba1_ssm(path, dtype=torch.float16),
    "state-spaces' mamba, untied, options": lambda path: write_mamba1_ssm(
        path, tie_embeddings=False, ssm_cfg={"layer": "Mamba1", "dt_rank": 5, "conv_bias": False}
    ),
    "mamba2": lambda path: write_mamba2(path, dtype=torch.bfloat16, time_step_limit=[0.0, {"__float__": "Infinity"}]),
    "mamba2, groups, biases, tied": lambda path: write_mamba2(path, n_groups=2, use_bias=True, tie_word_embeddings=True),
    "state-spaces, tied": lambda path: write_mamba_ssm(path, dtype=torch.float16),
    "state-spaces, untied, groups": lambda path: write_mamba_ssm(path, tie_embeddings=False, ssm_cfg={"ngroups": 2}),
}


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    if (path / "model.safetensors").exists():
        return load_file(path / "model.safetensors")
    return torch.load(path / "pytorch_model.bin", weights_only=True)


def assert_identical(a: Path, b: Path) -> None:
    """Every tensor (name, dtype, shape, bytes) and every config key."""
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
    assert config_of(a) == config_of(b)


def canonical(
    source: Path, out: Path, change: Callable[[int, LayerDescription], LayerDescription] = lambda index, layer: layer
) -> Path:
    """The source under canonical names, its layers described anew; tensors whose shape that changes are random."""
    with open_checkpoint(source) as checkpoint:
        config = canonical_config(checkpoint)
        layers = tuple(change(index, layer) for index, layer in enumerate(checkpoint.description.layers))
        model = ModelDescription(**{**vars(checkpoint.description), "layers": layers})
        config["statex"]["description"] = model.to_dict()
        if layers != checkpoint.description.layers:
            config["statex"]["provenance"] = {"plan": {"operations": []}, "new": [], "expanded": []}
        dtype = checkpoint.tensors["model.norm.weight"].dtype
        declared = {name: TensorInfo(shape, dtype) for name, (shape, _) in checkpoint.family.tensors(model).items()}
        generator = torch.Generator().manual_seed(1)
        with CheckpointWriter(out, declared) as writer:
            for name, info in declared.items():
                if checkpoint.tensors.get(name) == info:
                    writer.add(name, checkpoint.load(name))
                else:
                    writer.add(name, random_tensor(name, info.shape, generator).to(info.torch_dtype))
            writer.finish(config, checkpoint.carried_files)
    return out


@pytest.mark.parametrize("source", SOURCES)
def test_import_then_native_export_gives_every_tensor_and_config_key_back(tmp_path: Path, source: str) -> None:
    path = SOURCES[source](tmp_path / "source")
    export_native(path, tmp_path / "direct")
    assert_identical(path, tmp_path / "direct")
    canonical(path, tmp_path / "canonical")
    export_native(tmp_path / "canonical", tmp_path / "through")
    assert_identical(path, tmp_path / "through")


def test_a_tied_head_of_a_bin_shares_storage_as_in_the_source(tmp_path: Path) -> None:
    export_native(write_mamba_ssm(tmp_path / "source"), tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    assert tensors["lm_head.weight"].data_ptr() == tensors["backbone.embedding.weight"].data_ptr()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("kind", ["mamba2 (transformers)", "mamba2 (mamba_ssm)"])
def test_a_widened_mamba2_exports_with_its_new_state_size(tmp_path: Path, kind: str) -> None:
    source = WRITERS[kind](tmp_path / "source")
    canonical(source, tmp_path / "wide", lambda index, layer: layer.replace(key_dim=4 * layer.key_dim))
    export_native(tmp_path / "wide", tmp_path / "out")
    changed = {"state_size": 32} if "transformers" in kind else {"ssm_cfg": config_of(source)["ssm_cfg"] | {"d_state": 32}}
    assert config_of(tmp_path / "out") == config_of(source) | changed
    with open_checkpoint(tmp_path / "out") as out, open_checkpoint(tmp_path / "wide") as wide:
        assert out.description == wide.description
        assert all(torch.equal(out.load(name), wide.load(name)) for name in wide.tensors)


def test_transformers_loads_a_widened_export_whole(tmp_path: Path) -> None:
    from transformers import Mamba2ForCausalLM

    source = write_mamba2(tmp_path / "source", n_groups=2)
    canonical(source, tmp_path / "wide", lambda index, layer: layer.replace(key_dim=4 * layer.key_dim))
    export_native(tmp_path / "wide", tmp_path / "out")
    model, info = Mamba2ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.config.state_size == 32


def test_gla_heads_merged_by_inherit_export_as_a_gla_of_fewer_heads(tmp_path: Path) -> None:
    def merge(index: int, layer: LayerDescription) -> LayerDescription:
        key_dim = 4 * layer.key_dim
        return LayerDescription(1, 1, 1, key_dim, 4 * layer.value_dim, scale=key_dim**-0.5, norm_groups=1)

    source = write_gla(tmp_path / "source")
    export_native(canonical(source, tmp_path / "merged", merge), tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(source) | {"num_heads": 1}
    with open_checkpoint(tmp_path / "out") as out, open_checkpoint(tmp_path / "merged") as merged:
        assert out.description == merged.description


def test_gla_with_shared_heads_merges_both_counts(tmp_path: Path) -> None:
    def merge(index: int, layer: LayerDescription) -> LayerDescription:
        key_dim = 2 * layer.key_dim
        return LayerDescription(2, 1, 1, key_dim, 2 * layer.value_dim, scale=key_dim**-0.5, norm_groups=2)

    source = write_gla(tmp_path / "source", num_kv_heads=2)
    export_native(canonical(source, tmp_path / "merged", merge), tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(source) | {"num_heads": 2, "num_kv_heads": 1}


REFUSALS: dict[str, tuple[Callable[..., Path], Callable[[int, LayerDescription], LayerDescription], list[str]]] = {
    "preserve-merged layers": (
        write_gla,
        lambda index, layer: (
            layer.replace(
                query_heads=1, key_heads=1, value_heads=1, key_dim=16, value_dim=32, norm_groups=4, blocks=4, mixing="channel"
            )
            if index != 1
            else layer
        ),
        ["layers 0, 2 carry the tensor mixer.mixing", "merge_heads, preserve", "--to hf"],
    ),
    "a lifted gla layer": (
        write_gla,
        lambda index, layer: layer.replace(lift=2) if index == 2 else layer,
        ["layer 2 carries the tensor mixer.lift_gamma", "lift_keys"],
    ),
    "lifted mamba2 layers": (
        write_mamba2,
        lambda index, layer: layer.replace(lift=2),
        ["layers 0, 1, 2 carry the tensor mixer.lift_gamma", "no stock mamba2 checkpoint"],
    ),
    "layers that differ": (
        write_mamba2,
        lambda index, layer: layer.replace(key_dim=16) if index == 1 else layer,
        ["layer 1 has key_dim = 16, layer 0 has 8", "2 of 3 are like layer 0", "same factor"],
    ),
    "another scale": (
        write_gla,
        lambda index, layer: layer.replace(scale=0.7),
        ["scale = 0.7", "stock gla layer of 4 heads with keys of 4 channels has 0.5"],
    ),
    "another norm grouping": (
        write_mamba2,
        lambda index, layer: layer.replace(norm_groups=2),
        ["norm_groups = 2", "stock mamba2 layer has 1"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_stock_checkpoint_can_hold_is_refused_precisely_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    write, change, reasons = REFUSALS[case]
    path = canonical(write(tmp_path / "source"), tmp_path / "expanded", change)
    with pytest.raises(ExportError) as caught:
        export_native(path, tmp_path / "out")
    assert all(reason in str(caught.value) for reason in reasons), caught.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["mamba2, groups, biases, tied", "mamba2", "state-spaces, tied", "state-spaces, untied, groups"])
def test_mamba2_converts_between_its_dialects_and_back(tmp_path: Path, source: str) -> None:
    path = SOURCES[source](tmp_path / "source")
    with open_checkpoint(path) as original:
        other = {"transformers": "mamba_ssm", "mamba_ssm": "transformers"}[original.dialect]
        export_native(path, tmp_path / "other", dialect=other)
        with open_checkpoint(tmp_path / "other") as converted:
            assert converted.dialect == other
            assert converted.description == original.description
            assert converted.tensors == original.tensors
            assert all(torch.equal(converted.load(name), original.load(name)) for name in original.tensors)


def test_transformers_loads_state_spaces_weights_after_conversion(tmp_path: Path) -> None:
    from transformers import Mamba2ForCausalLM

    export_native(write_mamba_ssm(tmp_path / "source"), tmp_path / "out", dialect="transformers")
    model, info = Mamba2ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (model.config.n_groups, model.config.tie_word_embeddings, model.config.eos_token_id) == (1, True, None)


def test_a_dialect_of_another_family_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="gla has no dialect 'mamba_ssm'"):
        export_native(write_gla(tmp_path / "source"), tmp_path / "out", dialect="mamba_ssm")


def test_a_model_from_scratch_exports_with_a_complete_config(tmp_path: Path) -> None:
    path = canonical(write_gla(tmp_path / "source", tie_word_embeddings=True), tmp_path / "scratch")
    config = config_of(path)
    for key in ("source_config", "source_tensors", "dialect"):
        del config["statex"][key]
    (path / "config.json").write_text(json.dumps(config))
    export_native(path, tmp_path / "out")
    assert config_of(tmp_path / "out")["model_type"] == "gla"
    assert "model.layers.0.attn.g_norm_swish_gate.weight" in tensors_of(tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as out, open_checkpoint(path) as scratch:
        assert out.description == scratch.description


def test_a_dtype_that_training_changed_is_written_into_the_config(tmp_path: Path) -> None:
    path = canonical(write_mamba2(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "canonical")
    config = config_of(path)
    config["statex"]["source_config"]["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config))
    export_native(path, tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


def test_provenance_goes_into_the_header_and_tokenizers_along(tmp_path: Path) -> None:
    source = write_mamba2(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    canonical(source, tmp_path / "wide", lambda index, layer: layer.replace(key_dim=16))
    export_native(tmp_path / "wide", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["statex_provenance"])["plan"] == {"operations": []}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_limits_of_the_software_that_will_run_it_are_named(tmp_path: Path) -> None:
    notes = export_native(write_mamba2(tmp_path / "a", n_groups=2), tmp_path / "a-out")
    assert any("llama.cpp" in note and "this model has 8" in note for note in notes)
    assert any("5.23" in note and "2 groups" in note for note in notes)
    assert export_native(write_mamba2(tmp_path / "b", state_size=128), tmp_path / "b-out") == []
    notes = export_native(write_gla(tmp_path / "c", use_short_conv=True, conv_bias=True), tmp_path / "c-out")
    assert any("convolution biases" in note for note in notes)


@pytest.mark.parametrize("dialect", WRITERS)
def test_export_refuses_to_overwrite_without_force(tmp_path: Path, dialect: str) -> None:
    source = WRITERS[dialect](tmp_path / "source")
    export_native(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        export_native(source, tmp_path / "out")
    export_native(source, tmp_path / "out", force=True)
    with pytest.raises(CheckpointError, match="its own source"):
        export_native(source, source, force=True)


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left"), RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")],
)
def test_a_disk_that_fills_up_under_torch_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    source = write_mamba_ssm(tmp_path / "source")

    def save(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointError, match=r"the disk is full: 0\.\d+ MB are needed"):
        export_native(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_a_bin_is_written_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    load = Checkpoint.load

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = load(self, name)
        alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
        return tensor

    export_native(write_mamba2(tmp_path / "source"), tmp_path / "warm", dialect="mamba_ssm")
    monkeypatch.setattr(Checkpoint, "load", watched)
    export_native(tmp_path / "source", tmp_path / "out", dialect="mamba_ssm")
    assert max(alive) - min(alive) <= 2
