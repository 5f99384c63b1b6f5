from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import statex
from statex.errors import EvaluationError
from statex.evals import VerifyReport, verify
from statex.evals.passage import PASSAGE
from statex.surgery import expand_checkpoint

from ..fixtures import write_gla, write_mamba2
from .models import BYTES, Rule, random_model


def check(base: str | Path | nn.Module, expanded: str | Path | nn.Module, **options: object) -> VerifyReport:
    return verify(base, expanded, **{"max_tokens": 192, **options})  # type: ignore[arg-type]


@pytest.fixture
def gla(tmp_path: Path) -> Path:
    return write_gla(tmp_path / "gla", vocab_size=259)


@pytest.mark.parametrize(
    ("write", "operator"),
    [(write_gla, "merge_heads"), (write_gla, "lift_keys"), (write_mamba2, "widen_state"), (write_mamba2, "lift_keys")],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_preserve_passes_at_rounding(tmp_path: Path, write, operator: str, dtype: str) -> None:
    base = write(tmp_path / "base")
    expand_checkpoint(base, tmp_path / "out", operator=operator, factor=2, layers="all", init="preserve", progress=False)
    report = check(base, tmp_path / "out", dtype=dtype)
    assert report.same
    assert report.passed
    assert report.must_match
    assert report.agreement == 1
    assert report.kl < 1e-9
    assert report.state_growth == 2
    assert (report.parameter_growth > 0) == (report.parameters[1] > report.parameters[0])
    assert 0 < report.parameter_growth < 0.5


def test_inherit_is_told_apart_from_rounding_and_fails_only_if_asked(tmp_path: Path, gla: Path) -> None:
    expand_checkpoint(gla, tmp_path / "out", factor=2, layers="all", init="inherit", progress=False)
    report = check(gla, tmp_path / "out")
    assert not report.same
    assert report.passed
    assert report.intended_changes == ["init inherit"]
    assert "meant to change (init inherit)" in report.verdict
    assert not check(gla, tmp_path / "out", must_match=True).passed


def test_a_second_expansion_is_judged_by_its_own_init(tmp_path: Path, gla: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    expand_checkpoint(gla, first, operator="merge_heads", factor=2, layers="0", init="inherit", progress=False)
    expand_checkpoint(first, second, operator="lift_keys", factor=2, layers="1", init="preserve", progress=False)
    assert check(first, second).must_match
    assert check(first, second).same
    assert check(gla, second).intended_changes == ["init inherit"]


def test_a_small_change_of_one_weight_fails(gla: Path) -> None:
    base, changed = (statex.load(gla, dtype=torch.float32) for _ in range(2))
    assert check(base, changed).passed
    with torch.no_grad():
        changed.model.layers[1].mixer.g_norm.weight[3] += 1e-3
    report = check(base, changed)
    assert not report.passed
    assert "FAILED" in report.verdict


def test_loaded_models_are_verified_in_the_dtype_that_is_told_and_stay_as_they_are(tmp_path: Path) -> None:
    stored = write_gla(tmp_path / "half", vocab_size=259, dtype=torch.bfloat16)
    base, half = statex.load(stored, dtype=torch.float32), statex.load(stored)
    base.train()
    base.model.layers[1].eval()
    modes = [module.training for module in base.modules()]
    report = check(base, half)
    assert (report.dtype, report.same) == ("float32", True)
    assert check(base, half, dtype="float64").same
    assert (base.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert [module.training for module in base.modules()] == modes
    assert not any(module.training for module in half.modules())


def test_kl_and_agreement_are_those_of_the_definition() -> None:
    def constant(logits: torch.Tensor) -> nn.Module:
        model = Rule(lambda row: logits.expand(len(row), -1))
        model.config = type("Config", (), {"vocab_size": 3})()  # type: ignore[assignment]
        return model

    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    report = check(constant(p.log()), constant(q.log()))
    assert report.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert report.agreement == 0
    assert report.max_difference == pytest.approx(math.log(2.5), rel=1e-5)
    assert report.relative_difference == pytest.approx(math.log(2.5) / p.log().square().mean().sqrt().item(), rel=1e-5)
    assert not check(constant(p.log()), constant(torch.full((3,), math.nan))).passed


def test_without_a_tokenizer_the_bytes_of_the_text_are_run_and_the_report_says_so(tmp_path: Path, gla: Path) -> None:
    assert any("no tokenizer" in note for note in check(gla, gla).notes)
    BYTES.save_pretrained(gla)
    report = check(gla, gla)
    assert not report.notes
    assert report.tokens == 192
    (tmp_path / "short.txt").write_text(PASSAGE[:50], encoding="utf-8")
    short = check(gla, gla, data=tmp_path / "short.txt")
    assert (short.tokens, short.text) == (50, "short.txt")


def test_different_vocabularies_and_foreign_tokenizers_are_refused(tmp_path: Path, gla: Path) -> None:
    with pytest.raises(EvaluationError, match="259 and 300 tokens"):
        check(gla, random_model(vocabulary=300))
    with pytest.raises(EvaluationError, match="the model knows 48"):
        check(write_mamba2(tmp_path / "mamba2"), gla, tokenizer=BYTES)
    with pytest.raises(EvaluationError, match="1 tokens compare nothing"):
        check(gla, gla, max_tokens=1)


def test_the_report_prints_and_serialises(gla: Path) -> None:
    from rich.console import Console

    report = check(gla, gla)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(report.table())
    text = console.export_text()
    assert "largest logit difference" in text
    assert report.verdict in text
    assert report.to_dict()["passed"] is True
