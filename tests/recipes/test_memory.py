"""What a run keeps in memory: activations as far as they fit, and objects that the garbage collector leaves alone."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from statex.errors import TrainingError
from statex.models.activations import FittedCheckpointing
from statex.recipes.reporting import read_log
from statex.recipes.trainer import Trainer

from .helpers import run


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, base: Path, text: Path) -> None:
    logs = []
    for flag in (False, True):
        training = {"batch_size": 2, "gradient_checkpointing": flag, "save_every": 10}
        run(base, text, tmp_path / str(flag), training=training)
        logs.append([row["loss"] for row in read_log(tmp_path / str(flag) / "log.csv")])
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)


class Spacious:
    """A device's memory that holds the activations of all layers."""

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def capacity(self) -> int:
        return 1

    def restart(self) -> None:
        pass


def test_where_memory_runs_out_a_step_begins_anew_with_all_layers_checkpointed(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(base, text, tmp_path / "plain")
    train, losses, kept = Trainer.train, Trainer._losses, []

    def fitted_train(self: Trainer, *args: Any) -> Any:
        self.fitted = FittedCheckpointing(self.model, Spacious())
        return train(self, *args)

    def scarce_losses(self: Trainer, batches: Any, divisor: float) -> Any:
        assert self.fitted is not None
        kept.append(self.fitted.kept)
        if self.progress.step == 3 and self.fitted.kept:
            losses(self, batches[:1], divisor)  # leaves gradients of a part of the step
            raise torch.OutOfMemoryError
        return losses(self, batches, divisor)

    monkeypatch.setattr(Trainer, "train", fitted_train)
    monkeypatch.setattr(Trainer, "_losses", scarce_losses)
    run(base, text, tmp_path / "out", training={"gradient_checkpointing": True})
    assert kept == [0, 0, 2, 2, 0, 0, 0]
    assert [row["loss"] for row in read_log(expected.log)] == pytest.approx(
        [row["loss"] for row in read_log(tmp_path / "out/log.csv")], rel=1e-6
    )


def test_a_batch_that_memory_does_not_hold_is_told_with_what_to_set(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_losses", out_of_memory)
    with pytest.raises(TrainingError, match=r"memory does not suffice(?s:.)*training\.batch_size"):
        run(base, text, tmp_path / "out")


def test_the_garbage_collector_leaves_what_exists_alone_while_a_run_trains(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, frozen = Trainer._step, []

    def step(self: Trainer) -> Any:
        frozen.append(gc.get_freeze_count())
        return real(self)

    monkeypatch.setattr(Trainer, "_step", step)
    run(base, text, tmp_path / "out")
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0
