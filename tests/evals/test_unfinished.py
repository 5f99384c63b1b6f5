"""A half-done grid goes on where it stopped, and only if it is the same grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from statex.errors import EvaluationError
from statex.evals import EvalResult, evaluate

from .models import BYTES, Rule, recalls


class Failing(Rule):
    """Works for some forward passes and then breaks, as a power cut would."""

    def __init__(self, passes: int) -> None:
        super().__init__(recalls)
        self.passes = passes

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.passes == 0:
            raise KeyboardInterrupt
        self.passes -= 1
        return super().forward(*args, **options)


def test_what_was_interrupted_before_any_job_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stop:
        run(Failing(0), tmp_path / "out")
    assert not hasattr(stop.value, "__notes__")
    assert not list(tmp_path.iterdir())


def run(model: torch.nn.Module, out: Path, **options: Any) -> EvalResult:
    settings = {"num_pairs": [2, 3, 4], "samples": 2, "name": "model", "tokenizer": BYTES, "progress": False}
    return evaluate(model, ["mqar"], out=out, **settings | options)


def interrupted(out: Path) -> Path:
    with pytest.raises(KeyboardInterrupt) as stop:
        run(Failing(2), out)
    assert "--resume" in stop.value.__notes__[0]
    return out.with_name(f"{out.name}.unfinished.jsonl")


def test_finished_jobs_are_kept_and_not_run_again(tmp_path: Path) -> None:
    kept = interrupted(tmp_path / "deep" / "out")
    assert [json.loads(line).get("job") for line in kept.read_text().splitlines()] == [None, "2 pairs", "3 pairs"]
    assert not (tmp_path / "deep" / "out").exists()
    result = run(Failing(1), tmp_path / "deep" / "out", resume=True)
    assert not kept.exists()
    assert result.tasks["mqar"].cells == run(Rule(recalls), tmp_path / "other").tasks["mqar"].cells


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    kept = interrupted(tmp_path / "out")
    kept.write_text(kept.read_text()[:-30])
    with pytest.raises(KeyboardInterrupt):
        run(Failing(1), tmp_path / "out", resume=True)
    assert [json.loads(line).get("job") for line in kept.read_text().splitlines()] == [None, "2 pairs", "3 pairs"]
    assert len(run(Failing(1), tmp_path / "out", resume=True).tasks["mqar"].cells) == 3


def test_other_settings_and_other_models_are_refused_by_name(tmp_path: Path) -> None:
    kept = interrupted(tmp_path / "out")
    for options, word in (({"samples": 3}, "samples"), ({"seed": 4}, "seed"), ({"name": "other"}, "name")):
        with pytest.raises(EvaluationError, match=f"differs in {word} .*out.unfinished.jsonl"):
            run(Rule(recalls), tmp_path / "out", resume=True, **options)
    assert kept.exists()


def test_without_resume_everything_is_measured_anew(tmp_path: Path) -> None:
    kept = interrupted(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(Failing(1), tmp_path / "out")
    assert len(kept.read_text().splitlines()) == 2


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no unfinished evaluation to resume"):
        run(Rule(recalls), tmp_path / "out", resume=True)


def test_nothing_is_left_beside_a_complete_result(tmp_path: Path) -> None:
    run(Rule(recalls), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EvaluationError, match=r"No space left on device .*out\.unfinished\.jsonl"):
        run(Failing(99), tmp_path / "out")
