"""Plans: layers, defaults, YAML there and back, and what is wrong with a wrong one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from statex.checkpoints import Checkpoint, open_checkpoint
from statex.errors import PlanError
from statex.families import get_family
from statex.surgery import OPERATORS, Plan, resolve_plan
from tests.fixtures import GLA_CONFIG, MAMBA2_CONFIG


def subject(family: str, **overrides: Any) -> Any:
    """A checkpoint as far as plans look at it."""
    config = {"gla": GLA_CONFIG, "mamba2": MAMBA2_CONFIG}[family] | overrides
    return SimpleNamespace(family=get_family(family), description=get_family(family).describe(config, {}))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("every:3", [0, 3, 6]),
        ("every:100", [0]),
        ("0,6,2", [0, 2, 6]),
        ("5", [5]),
        (5, [5]),
        ([6, 1, 1], [1, 6]),
        (range(2), [0, 1]),
    ],
)
def test_layers_may_be_all_every_nth_a_list_or_one(layers: Any, expected: list[int]) -> None:
    plan = resolve_plan(subject("gla", num_hidden_layers=7), operator="merge_heads", layers=layers)
    assert plan.to_dict()["operations"][0]["layers"] == expected


@pytest.mark.parametrize(
    "layers", ["", "every:0", "every:x", "every:-1", "some", "1;2", [], [1.0], [True], None, {"a": 1}, "-1", 7, "0,7"]
)
def test_layers_that_mean_nothing_are_refused_with_a_remedy(layers: Any) -> None:
    plan = {"operations": [{"operator": "merge_heads", "layers": layers}]}
    with pytest.raises(PlanError) as caught:
        resolve_plan(subject("gla", num_hidden_layers=7), plan=plan)
    assert caught.value.fix


def test_a_layer_out_of_range_is_named_with_the_range() -> None:
    with pytest.raises(PlanError, match=r"layer 24 is out of range.*layers 0 to 23"):
        resolve_plan(subject("gla", num_hidden_layers=24), layers="0,24")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gla", {"operator": "merge_heads", "layers": [0, 6, 12, 18], "factor": 4, "init": "preserve"}),
        ("mamba2", {"operator": "widen_state", "layers": list(range(24)), "factor": 4, "init": "preserve"}),
    ],
)
def test_the_default_plan_has_the_papers_layers_and_factor(family: str, expected: dict[str, Any]) -> None:
    plan = resolve_plan(subject(family, num_hidden_layers=24))
    operation = plan.to_dict()["operations"][0]
    assert expected.items() <= operation.items()
    assert len(plan.operations) == 1
    assert plan.seed == 0


def test_factors_left_out_are_resolved_per_layer(tmp_path: Path) -> None:
    gla = subject("gla", num_hidden_layers=4)
    layers = list(gla.description.layers)
    layers[1] = layers[1].replace(key_heads=2, query_heads=2, value_heads=2)
    gla.description = type(gla.description)(**{**vars(gla.description), "layers": tuple(layers)})
    plan = resolve_plan(gla, operator="merge_heads", layers="all")
    assert [(op["layers"], op["factor"]) for op in plan.to_dict()["operations"]] == [([0, 2, 3], 4), ([1], 2)]


@pytest.mark.parametrize(
    "plan",
    [
        {"seed": 3, "operations": [{"operator": "merge_heads", "layers": "every:2", "factor": 2, "mixing": "scalar"}]},
        {"operations": [{"layers": [0], "factor": 2}, {"layers": [1], "factor": 4}, {"operator": "lift_keys", "factor": 2}]},
    ],
)
def test_yaml_there_and_back_is_the_same_plan(tmp_path: Path, plan: dict[str, Any]) -> None:
    gla = subject("gla")
    resolved = resolve_plan(gla, plan=plan)
    (tmp_path / "plan.yaml").write_text(resolved.to_yaml())
    again = resolve_plan(gla, plan_file=tmp_path / "plan.yaml")
    assert again == resolved
    assert yaml.safe_load(resolved.to_yaml()) == resolved.to_dict()


def test_entries_give_layers_settings_of_their_own() -> None:
    entries = [{"layers": 0, "factor": 2}, {"layers": [1, 2], "factor": 4, "init": "reinit"}]
    plan = resolve_plan(subject("gla"), plan={"operations": entries})
    chosen = [(op.options.factor, op.options.init) for index in range(3) for op in plan.for_layer(index)]
    assert chosen == [(2, "preserve"), (4, "reinit"), (4, "reinit")]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"operations": [{"operator": "merge_head"}]}, "did you mean 'merge_heads'"),
        ({"operations": [{"operator": "outer_product"}]}, "outer_product is not defined for the family gla"),
        ({"operations": [{"operator": 3}]}, "no operator 3"),
        ({"operations": [{"operator": ["lift_keys"]}]}, "no operator"),
        ({"operations": [{"facotr": 2}]}, "unknown key 'facotr' .did you mean 'factor'"),
        ({"operations": [{"operator": "lift_keys", "mixing": "scalar"}]}, "unknown key 'mixing'"),
        ({"operations": [{"factor": "many"}]}, "`factor` of merge_heads cannot be 'many'"),
        ({"operations": [{"factor": 2.5}]}, "`factor` of merge_heads cannot be 2.5"),
        ({"operations": [{"factor": True}]}, "`factor` of merge_heads cannot be True"),
        ({"operations": [{"init": "preserv"}]}, "`init` of merge_heads cannot be 'preserv'"),
        ({"operations": [{"mixing": "vector"}]}, "`mixing` of merge_heads cannot be 'vector'"),
        ({"operations": [{}, {"layers": "0"}]}, "layer 0 is named twice for merge_heads"),
        ({"operations": []}, "at least one entry"),
        ({"operations": "merge_heads"}, "at least one entry"),
        ({"operations": ["merge_heads"]}, "an entry must hold keys"),
        ({}, "at least one entry"),
        ({"operation": [{}]}, "unknown key 'operation' .did you mean 'operations'"),
        ({"operations": [{}], "seed": -1}, "`seed` must be a whole number"),
        ({"operations": [{}], "seed": "a"}, "`seed` must be a whole number"),
    ],
)
def test_a_wrong_plan_is_refused_with_what_where_and_fix(plan: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        resolve_plan(subject("gla"), plan=plan)
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "must hold the key"),
        ("", "must hold the key"),
        ("operations: [{factor: 3, x: 1}]", "unknown key 'x'"),
    ],
)
def test_a_broken_plan_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "my plan.yaml"
    file.write_text(text)
    with pytest.raises(PlanError, match=words) as caught:
        resolve_plan(subject("gla"), plan_file=file)
    assert "my plan.yaml" in str(caught.value)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot be read: No such file.*absent\.yaml"):
        resolve_plan(subject("gla"), plan_file=tmp_path / "absent.yaml")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_plan_given_as_a_path_is_the_file(tmp_path: Path, kind: type) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("operations: [{operator: lift_keys, layers: [1], factor: 2}]")
    plan = resolve_plan(subject("gla"), plan=kind(file))
    assert plan == resolve_plan(subject("gla"), plan_file=file)
    with pytest.raises(PlanError, match=r"absent\.yaml"):
        resolve_plan(subject("gla"), plan=kind(tmp_path / "absent.yaml"))
    with pytest.raises(PlanError, match="a plan and a plan file were both given"):
        resolve_plan(subject("gla"), plan=kind(file), plan_file=file)


def test_a_plan_and_single_options_are_not_mixed() -> None:
    with pytest.raises(PlanError, match="a plan and `factor` were both given"):
        resolve_plan(subject("gla"), plan={"operations": [{}]}, factor=2)


def test_a_seed_given_beside_a_plan_replaces_the_plans() -> None:
    plan = {"seed": 3, "operations": [{}]}
    assert resolve_plan(subject("gla"), plan=plan).seed == 3
    assert resolve_plan(subject("gla"), plan=plan, seed=5).seed == 5


@pytest.mark.parametrize(
    ("family", "entry", "words"),
    [
        ("gla", {"init": "inherit", "mixing": "scalar"}, "`mixing` of merge_heads has no meaning with init `inherit`"),
        ("mamba2", {"reinit_decay": True}, "`reinit_decay` of widen_state has no meaning with init `preserve`"),
        ("mamba2", {"init": "reinit", "zero": "B"}, "`zero` of widen_state has no meaning with init `reinit`"),
    ],
)
def test_an_option_that_the_init_does_not_read_is_refused(family: str, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        resolve_plan(subject(family), plan={"operations": [entry]})
    assert caught.value.fix


@pytest.mark.parametrize(
    ("family", "init", "options"),
    [
        ("gla", "preserve", {"mixing": "channel"}),
        ("gla", "inherit", {}),
        ("mamba2", "preserve", {"zero": "C"}),
        ("mamba2", "reinit", {"reinit_decay": False}),
    ],
)
def test_a_resolved_plan_writes_the_options_that_its_init_reads(family: str, init: str, options: dict[str, Any]) -> None:
    operation = resolve_plan(subject(family), init=init).to_dict()["operations"][0]
    assert {key: operation[key] for key in operation.keys() - {"operator", "layers", "factor", "init"}} == options


@pytest.mark.parametrize("name", OPERATORS)
def test_every_option_carries_its_help(name: str) -> None:
    assert all(field.metadata["help"] for field in OPERATORS[name].options.__dataclass_fields__.values())


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_every_operator_that_a_family_names_exists(family: str) -> None:
    assert set(get_family(family).operators) <= set(OPERATORS)


def test_an_open_checkpoint_is_what_plans_are_resolved_against(tmp_path: Path) -> None:
    from tests.surgery.helpers import write

    with open_checkpoint(write("gla", tmp_path / "base")) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        assert isinstance(resolve_plan(checkpoint), Plan)
