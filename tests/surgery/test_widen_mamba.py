"""widen_state on Mamba: where new rows and columns go, what they hold, and that all of them live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from statex.checkpoints import export_native
from statex.errors import PlanError
from tests.fixtures import write_mamba1_ssm
from tests.surgery.helpers import WIDEN, expand, largest_difference, logits, tensors, tokens, write
from tests.surgery.test_gradients import gradients_seen

RANK, STATE = 3, 8
PROJECTION, RATES = "model.layers.0.mixer.x_proj.weight", "model.layers.0.mixer.A_log"


def b_and_c(projection: torch.Tensor, state: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of B and of C of an `x_proj`, [dt, B, C]."""
    return projection[RANK : RANK + state], projection[RANK + state :]


@pytest.mark.parametrize("init", ["preserve", "inherit"])
def test_mambas_old_rows_stay_and_new_ones_follow_those_of_b_and_of_c(tmp_path: Path, init: str) -> None:
    base = write("mamba", tmp_path / "base")
    expand(base, tmp_path / "out", {**WIDEN, "factor": 3, "init": init})
    before, after = tensors(base), tensors(tmp_path / "out")
    assert torch.equal(after[PROJECTION][:RANK], before[PROJECTION][:RANK])
    for old, new in zip(b_and_c(before[PROJECTION], STATE), b_and_c(after[PROJECTION], 3 * STATE), strict=True):
        assert torch.equal(new[:STATE], old)
        assert torch.equal(new[STATE : 2 * STATE], old) is (init == "inherit")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mixer.{name}" for i in range(2) for name in ("x_proj.weight", "A_log")}


@pytest.mark.parametrize("zero", ["B", "C"])
def test_preserve_zeroes_one_side_of_mamba_and_draws_the_other_and_both_live(tmp_path: Path, zero: str) -> None:
    base = write("mamba", tmp_path / "base")
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "zero": zero})
    b, c = (rows[STATE:] for rows in b_and_c(tensors(tmp_path / "out")[PROJECTION], 2 * STATE))
    zeros, drawn = (b, c) if zero == "B" else (c, b)
    old = b_and_c(tensors(base)[PROJECTION], STATE)[1 if zero == "B" else 0]
    assert not bool(zeros.any())
    assert float(drawn.std()) == pytest.approx(float(old.std()), rel=0.15)
    seen, after = gradients_seen(tmp_path / "out", steps=2)
    for rows in b_and_c(seen[PROJECTION], 2 * STATE):
        assert bool((rows > 0).all())
    assert bool((seen[RATES] > 0).all())
    for rows in b_and_c(after[PROJECTION], 2 * STATE):
        assert torch.linalg.matrix_rank(rows) == 2 * STATE


def test_new_rates_repeat_the_old_ones_or_go_on_with_s4d_real(tmp_path: Path) -> None:
    base = write("mamba", tmp_path / "base")
    expand(base, tmp_path / "repeat", {**WIDEN, "factor": 2})
    expand(base, tmp_path / "continue", {**WIDEN, "factor": 2, "new_decays": "continue"})
    old = tensors(base)[RATES]
    assert torch.equal(tensors(tmp_path / "repeat")[RATES], torch.cat([old, old], 1))
    rates = tensors(tmp_path / "continue")[RATES]
    assert torch.equal(rates[:, :STATE], old)
    assert torch.allclose(rates[:, STATE:].exp(), torch.arange(9.0, 17).expand(64, 8))


def test_reinit_draws_b_and_c_of_mamba_and_keeps_time_steps(tmp_path: Path) -> None:
    base = write("mamba", tmp_path / "base")
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "init": "reinit"})
    before, after = tensors(base)[PROJECTION], tensors(tmp_path / "out")[PROJECTION]
    assert torch.equal(after[:RANK], before[:RANK])
    bound = 64**-0.5  # of torch's Linear, with 64 inputs
    drawn = after[RANK:]
    assert float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("source", ["transformers", "mamba_ssm"])
def test_a_widened_mamba_is_a_stock_checkpoint_of_either_project(tmp_path: Path, source: str) -> None:
    write_source = write_mamba1_ssm if source == "mamba_ssm" else lambda path: write("mamba", path)
    base = write_source(tmp_path / "base")
    expand(base, tmp_path / "out", {**WIDEN, "factor": 4})
    export_native(tmp_path / "out", tmp_path / "stock")
    told = json.loads((tmp_path / "stock" / "config.json").read_text())
    was = json.loads((base / "config.json").read_text())
    assert told == was | ({"state_size": 32} if source == "transformers" else {"ssm_cfg": {"d_state": 64}})
    assert largest_difference(base, tmp_path / "stock") < 1e-10


@torch.no_grad()
def test_transformers_computes_the_source_with_a_widened_mamba(tmp_path: Path) -> None:
    from transformers import MambaForCausalLM

    base = write("mamba", tmp_path / "base")
    expand(base, tmp_path / "out", {**WIDEN, "factor": 4})
    export_native(tmp_path / "out", tmp_path / "stock")
    model, info = MambaForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info.values())
    expected = logits(base, torch.float32)
    assert float((model.eval()(tokens()).logits - expected).abs().max()) < 2e-5 * float(expected.abs().max())


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rates of Mamba-2": ("mamba2", {"new_decays": "continue"}, "`new_decays` of widen_state is for the family mamba"),
    "the paper's reset of Mamba": ("mamba", {"init": "reinit", "reinit_decay": True}, "`reinit_decay` .* for the family mamba2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_of_the_other_mamba_is_refused(tmp_path: Path, case: str) -> None:
    family, options, complaint = REFUSED[case]
    with pytest.raises(PlanError, match=complaint):
        expand(write(family, tmp_path / "base"), None, {**WIDEN, "factor": 2, **options}, dry_run=True)
