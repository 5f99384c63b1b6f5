"""Opening good checkpoints: every dialect, every kind of file, nothing read before it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from statex.checkpoints import CheckpointWriter, TensorInfo, canonical_config, open_checkpoint
from statex.checkpoints.dialects import dialect_of
from statex.errors import CheckpointError
from statex.families import get_family
from tests.fixtures import WRITERS, write_gla, write_mamba2, write_mamba_ssm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a fixture by native name, read by the libraries that define the formats."""
    if (path / "model.safetensors").exists():
        return load_file(path / "model.safetensors")
    return torch.load(path / "pytorch_model.bin", weights_only=True)


def split_into_shards(path: Path, kind: str) -> None:
    """Replace a fixture's one file by two shards and an index."""
    tensors = stored(path)
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for single in ("model.safetensors", "pytorch_model.bin"):
        (path / single).unlink(missing_ok=True)
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        part = {name: tensors[name].clone() for name in half}
        if kind == "safetensors":
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file(part, path / file)
        else:
            file = f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save(part, path / file)
        weight_map |= dict.fromkeys(half, file)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", WRITERS)
def test_every_tensor_comes_back_as_stored(tmp_path: Path, dialect: str, dtype: torch.dtype) -> None:
    path = WRITERS[dialect](tmp_path / "ckpt", dtype=dtype)
    native = stored(path)
    with open_checkpoint(path) as checkpoint:
        assert f"{checkpoint.family.name} ({checkpoint.dialect})" == dialect
        assert {info.dtype for info in checkpoint.tensors.values()} == {str(dtype).removeprefix("torch.")}
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.load(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.torch_dtype)
            native_name = dialect_of(checkpoint.dialect, checkpoint.family.name).to_native(name, checkpoint.source_tensors)
            assert torch.equal(tensor, native[native_name])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dialect", WRITERS)
def test_shards_read_like_one_file(tmp_path: Path, dialect: str, kind: str) -> None:
    path = WRITERS[dialect](tmp_path / "ckpt", dtype=torch.bfloat16)
    with open_checkpoint(path) as one:
        whole = {name: one.load(name) for name in one.tensors}
    split_into_shards(path, kind)
    with open_checkpoint(path) as sharded:
        assert sharded.tensors.keys() == whole.keys()
        assert all(torch.equal(sharded.load(name), tensor) for name, tensor in whole.items())
        assert len(sharded.weight_files) == 2


def test_dtypes_are_kept_per_tensor(tmp_path: Path) -> None:
    path = write_mamba2(tmp_path / "ckpt", dtype=torch.bfloat16)
    tensors = stored(path)
    tensors["backbone.layers.1.mixer.A_log"] = tensors["backbone.layers.1.mixer.A_log"].float()
    save_file(tensors, path / "model.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.load("model.layers.1.mixer.A_log").dtype == torch.float32
        assert checkpoint.load("model.layers.0.mixer.A_log").dtype == torch.bfloat16


def test_a_bin_older_than_the_zip_format_is_read(tmp_path: Path) -> None:
    path = write_mamba_ssm(tmp_path / "ckpt")
    tensors = stored(path)
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.load("model.norm.weight"), tensors["backbone.norm_f.weight"])


def test_safetensors_are_preferred_to_bin(tmp_path: Path) -> None:
    path = write_mamba2(tmp_path / "ckpt")
    (path / "pytorch_model.bin").write_bytes(b"never read")
    with open_checkpoint(path) as checkpoint:
        assert [file.name for file in checkpoint.weight_files] == ["model.safetensors"]


def test_a_loaded_tensor_is_memory_of_its_own(tmp_path: Path) -> None:
    for dialect in WRITERS:
        with open_checkpoint(WRITERS[dialect](tmp_path / dialect)) as checkpoint:
            first = checkpoint.load("model.norm.weight")
            first.zero_()
            assert checkpoint.load("model.norm.weight").abs().min() > 0


def test_a_mapped_bin_survives_being_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statex.checkpoints.weights.BinWeights._REMAP_BYTES", 1)
    with open_checkpoint(write_mamba_ssm(tmp_path / "ckpt")) as checkpoint:
        assert torch.equal(checkpoint.load("model.norm.weight"), checkpoint.load("model.norm.weight"))


@pytest.mark.parametrize("dialect", [name for name in WRITERS if "mamba_ssm" not in name])
def test_opening_safetensors_and_reading_their_config_imports_no_torch(tmp_path: Path, dialect: str) -> None:
    path = WRITERS[dialect](tmp_path / "ckpt")
    code = (
        "import sys; from statex.checkpoints import canonical_config, inspect_checkpoint, open_checkpoint\n"
        f"canonical_config(open_checkpoint({str(path)!r})); inspect_checkpoint({str(path)!r})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tied_head_in_the_file_is_remembered_and_not_a_tensor_of_the_model(tmp_path: Path) -> None:
    with open_checkpoint(write_mamba_ssm(tmp_path / "with")) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.source_tensors["lm_head"]
    with open_checkpoint(write_mamba2(tmp_path / "without", tie_word_embeddings=True)) as checkpoint:
        assert not checkpoint.source_tensors["lm_head"]


def test_a_tied_head_that_differs_from_the_embedding_is_refused_when_read(tmp_path: Path) -> None:
    path = write_mamba_ssm(tmp_path / "ckpt")
    tensors = stored(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, path / "pytorch_model.bin")
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"lm_head\.weight holds other values"):
        checkpoint.load("model.embeddings.weight")


def test_a_config_that_does_not_say_is_tied_when_there_is_no_head(tmp_path: Path) -> None:
    for tied in (True, False):
        path = write_gla(tmp_path / str(tied), tie_word_embeddings=tied)
        config = json.loads((path / "config.json").read_text())
        del config["tie_word_embeddings"]
        (path / "config.json").write_text(json.dumps(config))
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.description.tie_word_embeddings is tied


def test_transformers_older_spelling_of_the_embedding_is_read_and_remembered(tmp_path: Path) -> None:
    path = write_mamba2(tmp_path / "ckpt")
    tensors = stored(path)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, path / "model.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.source_tensors["embedding"]
        assert torch.equal(checkpoint.load("model.embeddings.weight"), tensors["backbone.embedding.weight"])


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.0, {"__float__": "Infinity"}], [0.0, 8.0]])
def test_an_infinite_time_step_limit_is_understood_however_it_is_written(tmp_path: Path, limit: list) -> None:
    path = write_mamba2(tmp_path / "ckpt", time_step_limit=limit)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.description.mixer["time_step_limit"] == [0.0, 8.0 if limit[1] == 8.0 else None]
        json.dumps(checkpoint.description.to_dict(), allow_nan=False)


def test_tokenizer_generation_config_and_licence_are_carried_and_nothing_else(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "README.md",
        "optimizer.pt",
        "model.py",
    ):
        (path / name).write_text("{}")
    with open_checkpoint(path) as checkpoint:
        carried = [file.name for file in checkpoint.carried_files]
    assert carried == ["LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("dialect", WRITERS)
def test_a_canonical_copy_is_the_same_checkpoint(tmp_path: Path, dialect: str) -> None:
    source = open_checkpoint(WRITERS[dialect](tmp_path / "source", dtype=torch.bfloat16))
    with CheckpointWriter(tmp_path / "copy", source.tensors) as writer:
        for name in source.tensors:
            writer.add(name, source.load(name))
        writer.finish(canonical_config(source))
    copy = open_checkpoint(tmp_path / "copy")
    assert copy.config["model_type"] == "statex"
    assert copy.config["architectures"] == ["StatexForCausalLM"]
    assert copy.config["hidden_size"] == source.description.hidden_size
    for attribute in ("description", "dialect", "source_config", "source_tensors", "provenance", "family"):
        assert getattr(copy, attribute) == getattr(source, attribute)
    assert copy.is_canonical
    assert not copy.is_expanded
    assert {name: info.dtype for name, info in copy.tensors.items()} == dict.fromkeys(source.tensors, "bfloat16")
    assert all(torch.equal(copy.load(name), source.load(name)) for name in source.tensors)


def test_a_canonical_checkpoint_trained_from_scratch_needs_no_source(tmp_path: Path) -> None:
    model = get_family("gla").describe({"hidden_size": 8, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 8}, {})
    tensors = {name: TensorInfo(shape, "float32") for name, (shape, _) in get_family("gla").tensors(model).items()}
    with CheckpointWriter(tmp_path / "scratch", tensors) as writer:
        for name, info in tensors.items():
            writer.add(name, torch.zeros(info.shape))
        writer.finish({"model_type": "statex", "statex": {"version": 1, "description": model.to_dict()}})
    with open_checkpoint(tmp_path / "scratch") as checkpoint:
        assert (checkpoint.dialect, checkpoint.source_config, checkpoint.description) == ("fla", {}, model)


def test_a_source_that_has_code_of_its_own_does_not_pass_it_on(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt", auto_map={"AutoModelForCausalLM": "modeling_gla.GLAForCausalLM"})
    with open_checkpoint(path) as checkpoint:
        config = canonical_config(checkpoint)
    assert "auto_map" not in config
    assert "auto_map" in config["statex"]["source_config"]


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    path = write_gla(tmp_path / "ckpt")
    with open_checkpoint(path) as checkpoint:
        first = checkpoint.sha256()
    assert first.keys() == {"config.json", "model.safetensors"}
    write_gla(path, seed=1)
    with open_checkpoint(path) as checkpoint:
        second = checkpoint.sha256()
    assert first["config.json"] == second["config.json"]
    assert first["model.safetensors"] != second["model.safetensors"]


def test_a_hub_id_is_downloaded_without_bins_where_there_are_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gla(tmp_path / "snapshot")
    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with open_checkpoint("owner/model", revision="v1") as checkpoint:
        assert checkpoint.name == "owner/model@v1"
    assert [(repo, revision) for repo, revision, _ in asked] == [("owner/model", "v1")]
    assert not any("bin" in pattern for pattern in asked[0][2])


def test_a_hub_id_that_has_bins_only_is_downloaded_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mamba_ssm(tmp_path / "snapshot")
    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with open_checkpoint("owner/model") as checkpoint:
        assert checkpoint.dialect == "mamba_ssm"
    assert [any("bin" in pattern for pattern in patterns) for patterns in asked] == [False, True]
