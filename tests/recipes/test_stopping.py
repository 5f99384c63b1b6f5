"""Runs that are stopped, and go on."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from statex.errors import RecipeError, TrainingError
from statex.recipes import finetune
from statex.recipes.reporting import read_log
from statex.recipes.trainer import Trainer

from .helpers import (
    interrupt_after,
    log_without_times,
    run,
    tensors,
    write_byte_gla,
    write_byte_mamba2,
    write_documents,
    write_lifted,
    write_widened,
)


@pytest.mark.parametrize("write", [write_byte_gla, write_byte_mamba2])
@pytest.mark.parametrize("wide", [False, True])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, write: Any, wide: bool
) -> None:
    model = write(tmp_path / "model")
    sections: dict[str, Any] = {"schedule": {"max_steps": 8, "warmup_steps": 2}, "logging": {"every": 2}}
    if wide:
        model = write_widened(tmp_path / "wide", model)
        sections |= {"optimizer": {"multipliers": {"rows": 10.0}}, "training": {"precision": "bf16"}}
    run(model, text, tmp_path / "whole", **sections)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(TrainingError, match="stopped after step 5"):
            run(model, text, tmp_path / "parts", **sections)
    assert not (tmp_path / "parts/config.json").exists()
    run(model, None, tmp_path / "parts", resume=True)
    assert log_without_times(tmp_path / "parts") == log_without_times(tmp_path / "whole")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 3)
    with pytest.raises(TrainingError) as caught:
        run(base, text, tmp_path / "out")
    assert f"statex finetune {base} -o {tmp_path / 'out'} --resume" in str(caught.value)
    assert str(tmp_path / "out/checkpoints/step-3") in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_lines_logged_after_the_checkpoint_are_replaced_on_resuming(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Trainer) -> Any:
        if self.progress.step == 3:
            raise RuntimeError("killed")
        return real(self)

    real = Trainer._step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(base, text, tmp_path / "out")
    assert [row["step"] for row in read_log(tmp_path / "out/log.csv")] == [1, 2, 3]
    run(base, None, tmp_path / "out", resume=True)
    assert [row["step"] for row in read_log(tmp_path / "out/log.csv")] == [1, 2, 3, 4, 5, 6]


def test_nan_stops_before_the_update_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._forward

    def poisoned(self: Trainer, *args: Any) -> torch.Tensor:
        return real(self, *args) * (float("nan") if self.progress.step == 3 else 1.0)

    monkeypatch.setattr(Trainer, "_forward", poisoned)
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        run(base, text, tmp_path / "out")
    kept = tmp_path / "out/checkpoints/step-2"
    assert str(kept) in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in tensors(kept).values())
    assert not (tmp_path / "out/config.json").exists()


def test_a_spike_saves_nothing_and_stops_with_the_checkpoint_before_it(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._forward

    def diverging(self: Trainer, *args: Any) -> torch.Tensor:
        return real(self, *args) * (100.0 if self.progress.step >= 7 else 1.0)

    monkeypatch.setattr(Trainer, "_forward", diverging)
    training = {"batch_size": 2, "save_every": 2, "spike_guard": {"factor": 2.0, "patience": 5}}
    with pytest.raises(TrainingError, match="above 2 times its median") as caught:
        run(base, text, tmp_path / "out", schedule={"max_steps": 20}, training=training)
    assert str(tmp_path / "out/checkpoints/step-6") in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == ["step-4", "step-6"]


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.save, []

    def full(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="No space left") as caught:
        run(base, text, tmp_path / "out")
    assert str(tmp_path / "out/checkpoints/step-2") in str(caught.value)
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-2"]


def test_a_result_that_could_not_be_written_is_written_on_resuming(tmp_path: Path, base: Path, text: Path) -> None:
    run(base, text, tmp_path / "out")
    before = tensors(tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert run(base, None, tmp_path / "out", resume=True).steps == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_a_resumed_run_may_change_only_what_changes_no_weight(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(TrainingError):
            run(base, text, tmp_path / "out")
    options: dict[str, Any] = {"out": tmp_path / "out", "resume": True, "device": "cpu", "progress": False}
    with pytest.raises(RecipeError, match=r"cannot change optimizer\.learning_rate"):
        finetune(base, overrides=["optimizer.learning_rate=1"], **options)
    with pytest.raises(RecipeError, match="keeps its recipe and data"):
        finetune(base, "lpt", **options)
    with pytest.raises(RecipeError, match="other parameters"):
        finetune(write_lifted(tmp_path / "lifted", base), **options)
    result = finetune(base, overrides=["logging.every=3"], **options)
    assert [row["step"] for row in read_log(result.log)] == [1, 2, 3, 6]
    with pytest.raises(RecipeError, match="complete"):
        finetune(base, **options)


@pytest.mark.parametrize(
    "other", [["a cat", "a dog"], ["the dog sat on the mat. " * 4, "a cat ate the log. " * 3]], ids=["shorter", "as long"]
)
def test_a_run_is_not_resumed_on_other_text(
    tmp_path: Path, base: Path, text: Path, other: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 3)
    with pytest.raises(TrainingError):
        run(base, text, tmp_path / "out", data={"mixture": [{"kind": "text"}], "sequence_length": 24})
    write_documents(text, other)
    with pytest.raises(RecipeError, match="not the one that this run has read"):
        run(base, None, tmp_path / "out", resume=True)
