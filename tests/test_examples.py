"""The committed checkpoints are what `examples/pretrain_tiny.py` makes and the quickstart needs."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statex import quickstart
from statex.checkpoints import open_checkpoint
from statex.evals import evaluate
from statex.evals.mqar_rows import IGNORE

ROOT = Path(__file__).parent.parent
CHECKPOINTS = {
    "gla": ROOT / "examples/checkpoints/gla-books",
    "mamba2": ROOT / "examples/checkpoints/mamba2-books",
    "gla-quickstart": quickstart.CHECKPOINT,
}


@pytest.fixture(scope="module")
def pretrain() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples/pretrain_tiny.py"), run_name="pretrain_tiny")


@pytest.mark.parametrize("preset", CHECKPOINTS)
def test_a_preset_describes_its_committed_checkpoint(pretrain: dict[str, Any], preset: str) -> None:
    with open_checkpoint(CHECKPOINTS[preset]) as checkpoint:
        assert checkpoint.description == pretrain["describe"](pretrain["PRESETS"][preset], state=1, lift=1)


def test_training_rows_ask_every_key_once_and_label_the_values_only(pretrain: dict[str, Any]) -> None:
    preset = replace(pretrain["PRESETS"]["gla-quickstart"], window=256)
    mixture = pretrain["Mixture"](preset, quickstart.HELD_OUT, torch.device("cpu"), seed=0)
    ids, labels = (tensor.numpy() for tensor in mixture.mqar(8, rows=5))
    for row, answers in zip(ids, labels, strict=True):
        told, asked = (dict(half.reshape(-1, 2)) for half in np.split(row, 2))
        assert told == asked
        assert len(told) == 8
        assert (answers[17::2] == row[17::2]).all()
        assert (np.delete(answers, np.s_[17::2]) == IGNORE).all()


def test_joined_rows_fill_recall_rows_up_with_text_that_is_predicted_too(pretrain: dict[str, Any]) -> None:
    preset = replace(pretrain["PRESETS"]["mamba2"], window=256, text_rows=8)
    mixture = pretrain["Mixture"](preset, quickstart.HELD_OUT, torch.device("cpu"), seed=0)
    ids, labels = mixture.joined(16)
    assert ids.shape == labels.shape == (16, 256)
    assert torch.equal(labels[:8], ids[:8])
    assert torch.equal(labels[8:, 64:], ids[8:, 64:])
    assert torch.equal(labels[8:, 33:64:2], ids[8:, 33:64:2])
    assert bool((labels[8:, :33] == IGNORE).all())


def test_a_needle_row_states_the_number_that_it_asks_for(pretrain: dict[str, Any]) -> None:
    books = pretrain["read_bytes"](quickstart.HELD_OUT)
    for row in pretrain["needle_rows"](books, 300, 20, seed=0):
        text, question = bytes(row).decode(errors="replace").rstrip("\n").rsplit("\n", 1)
        assert f" {question} " in text


@pytest.mark.parametrize("preset", CHECKPOINTS)
def test_few_pairs_are_recalled_and_many_are_not(preset: str) -> None:
    recall = evaluate(CHECKPOINTS[preset], ["mqar"], num_pairs=[8, 128], samples=4, progress=False).tasks["mqar"]
    few, many = (recall.pooled(num_pairs=n).value for n in (8, 128))
    assert few > 0.9
    assert many < few
