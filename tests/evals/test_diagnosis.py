"""`statex diagnose`: where recall rests, and the plan that follows from it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

import statex
from statex.errors import EvaluationError, PlanError
from statex.evals.diagnosis import Diagnosis, auto_layers, diagnose, load_diagnosis
from statex.evals.diagnosis.findings import gaining_layers
from statex.evals.diagnosis.probes import COPY_SKIP, COPY_TOKENS, copy_probe, mqar_probe
from statex.evals.statistics import Difference
from statex.evals.task import Context, Options
from statex.evals.text import Haystack

from ..fixtures import write_gla
from ..mistakes import QUICKSTART, change_tensors
from .models import BYTES
from .test_results import text_of

FAST = {"samples": 10, "progress": False}


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose(QUICKSTART, operator="lift_keys", **FAST)  # type: ignore[arg-type]


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    folder = write_gla(tmp_path / "untrained", vocab_size=259)
    BYTES.save_pretrained(folder)
    return folder


def loss(value: float, p: float = 0.001) -> Difference:
    return Difference(value, value - 0.1, value + 0.1, p)


def test_recall_rests_on_long_memory_and_cutting_it_all_leaves_next_to_nothing(diagnosis: Diagnosis) -> None:
    assert diagnosis.recall > 0.5
    assert diagnosis.recall_without < 0.1
    assert diagnosis.lost_by_all.value == pytest.approx(diagnosis.recall - diagnosis.recall_without)
    assert diagnosis.lost_by_all.shown
    for finding in diagnosis.layers:
        assert finding.lost.low <= finding.lost.value <= finding.lost.high <= diagnosis.recall + 0.1


def test_heads_are_told_apart(diagnosis: Diagnosis) -> None:
    """In the embedded checkpoint one of the two heads of each layer does nearly all of the recall."""
    for finding in diagnosis.layers:
        first, second = finding.heads
        assert first.value > 2 * abs(second.value)
        assert max(first.value, second.value) <= finding.lost.value + 0.1


def test_a_layer_that_gives_nothing_loses_nothing_and_is_not_in_the_plan(tmp_path: Path) -> None:
    folder = shutil.copytree(QUICKSTART, tmp_path / "silent")
    change_tensors(folder, lambda tensors: tensors["model.layers.3.attn.o_proj.weight"].zero_())
    found = diagnose(folder, heads=False, states=False, **FAST)  # type: ignore[arg-type]
    silent = found.layers[3].lost
    assert (silent.value, silent.p, silent.shown) == (0, 1, False)
    assert found.plan is not None
    assert found.plan["operations"][0]["layers"] == found.gaining_layers
    assert 3 not in found.gaining_layers
    assert found.gaining_layers


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([loss(0.5), loss(0.3), loss(0.04)], [0, 1]),
        ([loss(0.5), loss(0.3, p=0.2), loss(0.26), loss(0.24)], [0, 2]),
        ([loss(0.5, p=0.5), loss(0.04)], [1]),
        ([loss(0.0, p=1), loss(-0.2)], []),
        ([], []),
    ],
)
def test_layers_would_gain_where_a_loss_is_shown_and_not_small(losses: list[Difference], expected: list[int]) -> None:
    assert gaining_layers(dict(enumerate(losses))) == expected


def test_the_plan_can_be_carried_out(diagnosis: Diagnosis, tmp_path: Path) -> None:
    paths = diagnosis.save(tmp_path / "diagnosis")
    summary = statex.expand(QUICKSTART, None, plan_file=tmp_path / "diagnosis" / "plan.yaml", dry_run=True)
    assert [row.layer for row in summary.rows] == diagnosis.gaining_layers
    assert {row.operator for row in summary.rows} == {"lift_keys"}
    assert yaml.safe_load((tmp_path / "diagnosis" / "plan.yaml").read_text()) == diagnosis.plan
    figures = ["recall_lost_by_layer.png", "recall_lost_by_head.png", "half_life_by_layer.png"]
    assert [path.name for path in paths] == ["diagnosis.json", "plan.yaml", *figures, "report.html", "report.md"]


def test_a_layer_that_cannot_be_expanded_is_left_out_of_the_plan_with_its_reason(tmp_path: Path) -> None:
    statex.expand(QUICKSTART, tmp_path / "lifted", operator="lift_keys", factor=4, layers="2", progress=False)
    found = diagnose(tmp_path / "lifted", operator="lift_keys", factor=2, heads=False, states=False, **FAST)  # type: ignore[arg-type]
    assert 2 in found.gaining_layers
    assert found.plan is not None
    assert 2 not in found.plan["operations"][0]["layers"]
    assert any("layer 2 is not in the plan" in sentence for sentence in found.advice)


def test_a_diagnosis_survives_the_file(diagnosis: Diagnosis, tmp_path: Path) -> None:
    diagnosis.save(tmp_path)
    assert load_diagnosis(tmp_path) == load_diagnosis(tmp_path / "diagnosis.json") == diagnosis
    assert json.loads((tmp_path / "diagnosis.json").read_text())["gaining_layers"] == diagnosis.gaining_layers


def test_a_half_life_beyond_the_horizon_survives_the_file(diagnosis: Diagnosis) -> None:
    memory = diagnosis.layers[0].memory
    assert memory is not None
    memory.half_life[0], kept = math.inf, memory.half_life[0]
    try:
        told = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
        assert told["layers"][0]["memory"]["half_life"][0] is None
        assert Diagnosis.from_dict(told) == diagnosis
        assert f"> {memory.horizon}" in text_of(diagnosis.table())
    finally:
        memory.half_life[0] = kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no diagnosis"),
        ("{", "not valid JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 1}', "lacks or misnames"),
    ],
)
def test_files_that_are_no_diagnoses_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "diagnosis.json").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        load_diagnosis(tmp_path)


def test_the_table_says_what_was_found(diagnosis: Diagnosis) -> None:
    text = text_of(diagnosis.table())
    for words in (
        "recall lost by head",
        "effective rank",
        "half-life",
        "Recall rests on the long memory of layers",
        "16 to 31 tokens",
    ):
        assert words in text


def test_a_model_without_recall_gets_no_plan_and_auto_says_so(untrained: Path) -> None:
    found = diagnose(untrained, heads=False, states=False, **FAST)  # type: ignore[arg-type]
    assert found.settings["probe"] == "copy"
    assert found.plan is None
    assert not found.gaining_layers
    with pytest.raises(EvaluationError, match="no layer can be chosen") as caught:
        auto_layers(untrained, **FAST)
    assert "--layers" in str(caught.value)


def test_auto_names_no_layer_outside_those_that_it_is_given(diagnosis: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statex.evals.diagnosis.run.diagnose", lambda checkpoint, **options: diagnosis)
    gaining = diagnosis.gaining_layers
    others = [finding.layer for finding in diagnosis.layers if finding.layer not in gaining]
    assert auto_layers(QUICKSTART) == auto_layers(QUICKSTART, among=range(9)) == gaining
    assert auto_layers(QUICKSTART, among=[*others, gaining[0]]) == gaining[:1]
    with pytest.raises(EvaluationError, match=f"recall rests on layers {gaining[0]}.*cannot be expanded"):
        auto_layers(QUICKSTART, among=others)


def test_what_opened_is_told_of_an_expanded_checkpoint(untrained: Path, tmp_path: Path) -> None:
    statex.expand(untrained, tmp_path / "merged", operator="merge_heads", layers="1", factor=2, progress=False)
    change_tensors(tmp_path / "merged", lambda tensors: tensors["model.layers.1.mixer.mixing"].add_(0.5))
    found = diagnose(tmp_path / "merged", heads=False, states=False, **FAST)  # type: ignore[arg-type]
    opened = [(one.layer, each.tensor, each.rms) for one in found.layers for each in one.opened]
    assert opened == [(1, "mixer.mixing", pytest.approx(0.5))]
    assert "mixer.mixing" in text_of(found.table())


def test_mqar_answers_are_the_values_and_copy_answers_the_second_reading() -> None:
    context = Context(BYTES, Options((), (), (), 3, 0))
    probe = mqar_probe(context, 5)
    assert probe.ids.shape == (3, 20)
    assert probe.answers.tolist() == [False, True] * 5
    pairs = [dict(zip(row[0:10:2], row[1:10:2], strict=True)) for row in probe.ids.tolist()]
    asked = [row[10:] for row in probe.ids.tolist()]
    assert all(
        known[key] == value for known, row in zip(pairs, asked, strict=True) for key, value in zip(row[::2], row[1::2], strict=True)
    )
    copied = copy_probe(context, Haystack(BYTES, ["One sentence after another. " * 40], "text"))
    assert (copied.ids[:, :COPY_TOKENS] == copied.ids[:, COPY_TOKENS:]).all()
    assert copied.answers.sum() == COPY_TOKENS - COPY_SKIP


def test_options_out_of_range_are_refused_before_anything_is_measured(untrained: Path) -> None:
    for options, message in (
        ({"window": 0}, "window is 0"),
        ({"window": 384}, "cuts nothing from the probe's rows of 384"),
        ({"samples": 0}, "samples is 0"),
        ({"probe": "guess"}, "no probe 'guess'"),
    ):
        with pytest.raises(EvaluationError, match=message):
            diagnose(untrained, **FAST | options)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="outer_product is not defined"):
        diagnose(untrained, operator="outer_product", **FAST)  # type: ignore[arg-type]


def test_a_plan_that_asks_for_auto_is_told_how_to_measure(untrained: Path) -> None:
    with pytest.raises(PlanError, match="a plan cannot do"):
        statex.expand(untrained, None, layers="auto", dry_run=True)
