"""Which rows surgery appended: without them a tensor is what it is without the widening."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statex
from statex.checkpoints import export_native, open_checkpoint
from statex.errors import CheckpointError
from statex.surgery.new_rows import KEY_ROWS, new_rows
from statex.surgery.operators.widen_state import WIDENINGS
from tests.surgery.helpers import LIFT, MERGE, WIDEN, expand, tensors, write
from tests.surgery.test_matrix import CASES

BIASED = {"num_kv_heads": 2, "use_short_conv": True, "conv_bias": True}
SPECTRUM = {"operator": "extend_spectrum", "layers": "all"}
Plan = list[dict[str, Any]]
"""Operations of one expansion; a stack of expansions is a list of these."""

STACKS: dict[str, tuple[str, dict[str, Any], list[Plan]]] = {
    "gla": ("gla", {}, [[{**WIDEN, "factor": 3}]]),
    "gla, shared keys, convolutions": ("gla", BIASED, [[{**WIDEN, "factor": 4}]]),
    "gla, inherit, a layer of two": ("gla", BIASED, [[{**WIDEN, "factor": 2, "init": "inherit", "layers": [1]}]]),
    "gla, all four": ("gla", BIASED, [[{**MERGE, "factor": 2}, {**WIDEN, "factor": 3}, LIFT, SPECTRUM]]),
    "gla, wider twice": ("gla", {"num_kv_heads": 2}, [[{**WIDEN, "factor": 2}], [{**WIDEN, "factor": 3}]]),
    "gla, wider, then merged": ("gla", BIASED, [[{**WIDEN, "factor": 2}], [MERGE]]),
    "gla, wider, then merged by inherit": ("gla", BIASED, [[{**WIDEN, "factor": 2}], [{**MERGE, "init": "inherit"}]]),
    "gla, merged, wider, merged, wider": (
        "gla",
        {"num_heads": 8, "expand_k": 1.0},
        [[{**MERGE, "factor": 2}, {**WIDEN, "factor": 2}], [{**MERGE, "factor": 2}, {**WIDEN, "factor": 2}]],
    ),
    "gla, redrawn, then wider": (
        "gla",
        {},
        [[{**WIDEN, "factor": 2}], [{**MERGE, "factor": 2, "init": "reinit"}], [{**WIDEN, "factor": 2}]],
    ),
    "mamba2": ("mamba2", {}, [[{**WIDEN, "factor": 4}]]),
    "mamba2, groups, biases": ("mamba2", {"n_groups": 2, "use_bias": True}, [[{**WIDEN, "factor": 3, "zero": "B"}]]),
    "mamba2, inherit, no conv bias": ("mamba2", {"use_conv_bias": False}, [[{**WIDEN, "factor": 2, "init": "inherit"}]]),
    "mamba2, wider twice, lifted": ("mamba2", {"n_groups": 2}, [[{**WIDEN, "factor": 2}], [{**WIDEN, "factor": 2}, LIFT]]),
    "mamba": ("mamba", {}, [[{**WIDEN, "factor": 3}]]),
    "mamba, a layer of two, twice": (
        "mamba",
        {},
        [[{**WIDEN, "factor": 2, "layers": [0]}], [{**WIDEN, "factor": 2, "layers": [0]}]],
    ),
}


def appended(path: Path) -> dict[str, list[slice]]:
    with open_checkpoint(path) as checkpoint:
        return new_rows(checkpoint.description, checkpoint.provenance)


def stacked(base: Path, folder: Path, plans: list[Plan]) -> Path:
    """The plans carried out one upon the other."""
    for number, plan in enumerate(plans):
        expand(base, folder / str(number), *plan)
        base = folder / str(number)
    return base


def without_widening(plans: list[Plan]) -> list[Plan]:
    """What is left to do when nothing that is still there is widened: from the last redrawing on, widenings before it count."""
    redrawn = max((number for number, plan in enumerate(plans) for entry in plan if entry.get("init") == "reinit"), default=-1)
    kept = [
        [entry for entry in plan if number <= redrawn or entry["operator"] != WIDEN["operator"]]
        for number, plan in enumerate(plans)
    ]
    return [plan for plan in kept if plan]


def others(tensor: Tensor, runs: list[slice]) -> Tensor:
    """The rows that are not in these runs."""
    old = torch.ones(len(tensor), dtype=torch.bool)
    for run in runs:
        assert run.stop > run.start
        assert old[run].all()
        old[run] = False
    return tensor[old]


@pytest.mark.parametrize(("family", "config", "plans"), STACKS.values(), ids=STACKS)
def test_a_tensor_without_its_new_rows_is_the_tensor_without_the_widening(
    tmp_path: Path, family: str, config: dict[str, Any], plans: list[Plan]
) -> None:
    base = write(family, tmp_path / "base", **config)
    wide = stacked(base, tmp_path / "wide", plans)
    narrow = tensors(stacked(base, tmp_path / "narrow", without_widening(plans)))
    told, now = appended(wide), tensors(wide)
    for name, runs in told.items():
        assert torch.equal(others(now[name], runs), narrow[name]), name
    grown = {name for name in narrow if now[name].shape != narrow[name].shape}
    assert told.keys() == {
        name for name in grown if not name.endswith(("gk_proj.1.weight", "gk_proj.1.bias", "A_log", "mixing", "gamma"))
    }
    assert told.keys() <= {name for name, _ in statex.load(wide).named_parameters()}


@pytest.mark.parametrize(
    ("family", "plans"),
    [
        ("gla", []),
        ("gla", [[{**WIDEN, "factor": 2, "init": "reinit"}]]),
        ("gla", [[{**WIDEN, "factor": 2}], [{**LIFT, "init": "reinit"}]]),
        ("gla", [[{**WIDEN, "factor": 2}], [{**MERGE, "init": "reinit"}]]),
        ("mamba2", []),
        ("mamba2", [[{**WIDEN, "factor": 2, "init": "reinit"}]]),
        ("mamba2", [[{**WIDEN, "factor": 2}, {**LIFT, "init": "reinit"}]]),
        ("mamba", [[{**WIDEN, "factor": 2, "init": "reinit"}]]),
    ],
)
def test_where_nothing_was_appended_or_all_was_redrawn_no_row_is_new(tmp_path: Path, family: str, plans: list[Plan]) -> None:
    assert appended(stacked(write(family, tmp_path / "base"), tmp_path / "out", plans)) == {}


def test_a_stock_export_has_no_record_and_no_new_rows(tmp_path: Path) -> None:
    expand(write("mamba2", tmp_path / "base"), tmp_path / "out", {**WIDEN, "factor": 2})
    export_native(tmp_path / "out", tmp_path / "stock")
    assert appended(tmp_path / "out")
    assert appended(tmp_path / "stock") == {}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if all(e["operator"] != "widen_state" for e in case.plan)])
def test_no_other_operator_appends_rows_to_a_tensor_that_the_source_has(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base = write(case.family, tmp_path / "base", **case.config)
    expand(base, tmp_path / "out", *case.plan)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {name for name in before.keys() & after.keys() if before[name].numel() != after[name].numel()} == set()
    assert appended(tmp_path / "out") == {}


def test_every_family_that_can_be_widened_says_where_its_keys_are() -> None:
    assert KEY_ROWS.keys() == WIDENINGS.keys()


def test_a_record_of_other_layers_is_refused(tmp_path: Path) -> None:
    expand(write("gla", tmp_path / "base"), tmp_path / "out", {**WIDEN, "factor": 2})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["statex"]["provenance"]["plan"]["operations"][0]["factor"] = 3
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="layer 0 has keys of 8 channels, and the surgery on record made them 3 times as long"
    ):
        appended(tmp_path / "out")
