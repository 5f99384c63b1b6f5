"""Writing: complete or absent, whatever happens, and never over something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from statex.checkpoints import CheckpointWriter, OutputFolder, TensorInfo
from statex.errors import CheckpointError

TENSORS = {
    "b": torch.randn(5, 3),
    "a": torch.randn(7).bfloat16(),
    "scalar": torch.randn(()),
    "empty": torch.empty(0, 4),
    "half": torch.randn(3, 3, dtype=torch.float16),
    "view": torch.randn(4, 6).t(),
}
CONFIG = {"model_type": "statex", "vocab_size": 3}


def infos(tensors: dict[str, torch.Tensor] = TENSORS) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def write(out: Path, tensors: dict[str, torch.Tensor] = TENSORS, **options: object) -> Path:
    with CheckpointWriter(out, infos(tensors), **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(CONFIG)
    return out


def same(written: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    return written.keys() == tensors.keys() and all(
        written[name].dtype == tensor.dtype and torch.equal(written[name], tensor) for name, tensor in tensors.items()
    )


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    out = write(tmp_path / "out", metadata={"plan": "none"})
    assert same(load_file(out / "model.safetensors"), TENSORS)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "plan": "none"}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    limit=st.integers(1, 300),
    order=st.randoms(use_true_random=False),
)
def test_any_tensors_come_back_from_any_shards_added_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, shapes: list, limit: int, order: object
) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    tensors = {f"t{i}": torch.randn(shape).to(dtypes[i % 3]) for i, shape in enumerate(shapes)}
    out = tmp_path_factory.mktemp("property") / "out"
    names = list(tensors)
    order.shuffle(names)  # type: ignore[attr-defined]
    with CheckpointWriter(out, infos(tensors), max_shard_bytes=limit) as writer:
        for name in names:
            writer.add(name, tensors[name])
        writer.finish(CONFIG)
    files = sorted(out.glob("*.safetensors"))
    read = [load_file(path) for path in files]
    assert same({name: tensor for shard in read for name, tensor in shard.items()}, tensors)
    for shard in read:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit
    if len(files) > 1:
        weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map == {name: path.name for path, shard in zip(files, read, strict=True) for name in shard}


def test_transformers_finds_all_shards_through_the_index(tmp_path: Path) -> None:
    from transformers.utils.hub import get_checkpoint_shard_files

    out = write(tmp_path / "out", max_shard_bytes=60)
    files, table = get_checkpoint_shard_files(str(out), str(out / "model.safetensors.index.json"))
    assert len(files) > 1
    assert set(table["all_checkpoint_keys"]) == set(TENSORS)


def test_carried_and_extra_files_are_there(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(b"\xff\x00")
    with CheckpointWriter(tmp_path / "out", infos()) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.finish(CONFIG, [tokenizer], {"plan.yaml": "factor: 4\n"})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\xff\x00"
    assert (tmp_path / "out" / "plan.yaml").read_text() == "factor: 4\n"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, None])
def test_leaving_early_leaves_nothing(tmp_path: Path, failure: type[BaseException] | None) -> None:
    def leave() -> None:
        with CheckpointWriter(tmp_path / "out", infos()) as writer:
            writer.add("a", TENSORS["a"])
            if failure:
                raise failure

    if failure:
        with pytest.raises(failure):
            leave()
    else:
        leave()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_what_was_there(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    with pytest.raises(ValueError, match="not added"), CheckpointWriter(out, infos(), force=True) as writer:
        writer.finish({"model_type": "other"})
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert list(tmp_path.iterdir()) == [out]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out")
    rename = Path.rename

    def fail_for_the_new_folder(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_folder)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(out, force=True)
    assert list(tmp_path.iterdir()) == [out]
    assert same(load_file(out / "model.safetensors"), TENSORS)


def test_a_checkpoint_is_replaced_only_when_forced_and_wholly(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    (out / "stale.txt").write_text("old")
    with pytest.raises(CheckpointError, match="--force"):
        write(out)
    assert (out / "stale.txt").exists()
    write(out, {"only": torch.ones(2)}, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [out]


def test_force_does_not_replace_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        write(tmp_path / "thesis", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        write(tmp_path / "file", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


@pytest.mark.parametrize("out", ["source", ".", "link"])
def test_the_source_is_never_replaced_even_when_forced(tmp_path: Path, out: str) -> None:
    source = write(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="its own source"):
        write(tmp_path / out, force=True, protect=[source])
    assert same(load_file(source / "model.safetensors"), TENSORS)


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    with pytest.raises(CheckpointError, match=r"4\.00 MB are needed and 3\.00 MB are free"):
        CheckpointWriter(tmp_path / "out", {"big": TensorInfo((1_000_000,), "float32")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_says_how_much_was_needed_and_leaves_nothing(tmp_path: Path) -> None:
    big = {"big": torch.zeros(1_000_000)}

    def fill() -> None:
        with CheckpointWriter(tmp_path / "out", infos(big)) as writer:
            writer._files["model.safetensors"] = Path("/dev/full").open("wb")  # noqa: SIM115
            writer.add("big", big["big"])

    with pytest.raises(CheckpointError, match=r"the disk is full: 4\.00 MB are needed in all"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_in_another_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from statex.checkpoints import CheckpointWriter, TensorInfo\n"
        f"with CheckpointWriter({str(tmp_path / 'out')!r}, {{'a': TensorInfo((4,), 'float32')}}):\n"
        "    print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        OutputFolder(tmp_path / "file" / "out")


def test_what_is_added_must_be_what_was_declared(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", infos()) as writer:
        with pytest.raises(ValueError, match="not declared"):
            writer.add("c", TENSORS["b"])
        with pytest.raises(ValueError, match="declared as"):
            writer.add("b", TENSORS["b"].double())
        with pytest.raises(ValueError, match="declared as"):
            writer.add("b", TENSORS["b"].t())
        writer.add("b", TENSORS["b"])
        with pytest.raises(ValueError, match="added before"):
            writer.add("b", TENSORS["b"])


def test_a_written_folder_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert write(tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
