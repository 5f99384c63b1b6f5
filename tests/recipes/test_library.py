"""Recipes as files: what ships is valid, what is wrong is said with its place and a way out."""

import subprocess
import sys
from pathlib import Path

import pytest

from statex.errors import RecipeError
from statex.recipes import copy_recipe, dump_recipe, list_recipes, load_recipe, recipe_text
from statex.recipes.library import known_keys

from .helpers import write_recipe


def test_every_shipped_recipe_is_valid_and_described() -> None:
    names = [info.name for info in list_recipes()]
    assert set(names) == {"recovery", "lpt", "statex-paper", "quickstart", "tracking"}
    assert all(info.description for info in list_recipes())


def test_lpt_differs_from_recovery_only_in_multipliers_and_description() -> None:
    recovery, lpt = (load_recipe(name).model_dump() for name in ("recovery", "lpt"))
    assert lpt["optimizer"].pop("multipliers") == {"new": 1.0, "expanded": 1.0, "rows": 1.0, "rest": 1.0}
    recovery["optimizer"].pop("multipliers")
    assert lpt.pop("description") != recovery.pop("description")
    assert lpt == recovery


def test_the_paper_recipe_has_the_paper_numbers() -> None:
    paper = load_recipe("statex-paper")
    assert paper.data.sequence_length == 65536
    assert paper.training.tokens_per_step == 512 * 1024
    assert (paper.schedule.max_steps, paper.schedule.warmup_steps, paper.schedule.min_ratio) == (20_000, 1_000, 0.0)
    assert (paper.optimizer.learning_rate, paper.optimizer.betas) == (3e-4, (0.9, 0.95))
    assert (paper.optimizer.weight_decay, paper.optimizer.clip_norm) == (0.1, 1.0)


def test_recovery_explains_every_key_of_the_schema() -> None:
    shown = recipe_text("recovery")
    leaves = {key.rpartition(".")[2] for key in known_keys()} - {"name", "split", "shuffle_block", "path"}
    assert [leaf for leaf in sorted(leaves) if f"{leaf}:" not in shown] == []


def test_every_key_of_the_schema_has_help_text() -> None:
    from statex.recipes import schema

    sections = [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, schema.Section)]
    missing = [f"{cls.__name__}.{key}" for cls in sections for key, field in cls.model_fields.items() if not field.description]
    assert len(sections) > 8
    assert missing == []


def test_listing_recipes_imports_no_torch() -> None:
    code = "import sys, statex.recipes as r; r.list_recipes(); sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.learning_rat=1e-3", "optimizer.learning_rate"),
        ("learning_rate=1e-3", "optimizer.learning_rate"),
        ("training.warmup_step=3", "schedule.warmup_steps"),
        ("data.mixture.0.weigth=3", "data.mixture.N.weight"),
        ("optimizer.multipliers.news=3", "optimizer.multipliers.new"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(override: str, key: str) -> None:
    with pytest.raises(RecipeError, match="unknown key") as caught:
        load_recipe("quickstart", [override])
    assert override.partition("=")[0] in str(caught.value)
    assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.sequence_length=1", "data.sequence_length"),
        ("optimizer.multipliers.rows=0", "optimizer.multipliers.rows': Input should be greater than 0"),
        ("data.mixture=[]", "data.mixture"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("schedule.max_tokens=5", "exactly one of max_steps and max_tokens"),
        ("schedule.max_steps=null", "exactly one of max_steps and max_tokens"),
        ("training.precision=fp8", "training.precision"),
        ("training.gradient_checkpointing=some", "training.gradient_checkpointing': Input should be True, False or 'auto'"),
        ("data.mixture.7.weight=1", "'7'"),
        ("data.mixture.0.kind=images", "data.mixture.0"),
        ("nothing", "does not set anything"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(override: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    assert told in str(caught.value)


def test_overrides_set_numbers_lists_and_list_items() -> None:
    recipe = load_recipe(
        "quickstart", ["optimizer.learning_rate=3e-4", "optimizer.betas=[0.8, 0.9]", "data.mixture.1.num_pairs=[4]"]
    )
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.data.mixture[1].model_dump()["num_pairs"] == [4]


def test_one_override_may_stand_alone() -> None:
    assert load_recipe("quickstart", "schedule.max_steps=7").schedule.max_steps == 7
    with pytest.raises(RecipeError, match="'seven' does not set anything"):
        load_recipe("quickstart", "seven")


def test_an_unknown_recipe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'recovery'"):
        load_recipe("recover")


def test_a_recipe_survives_dumping_and_loading(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_recipe_extends_a_shipped_one_or_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nschedule: {max_steps: 7}\n")
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\ntraining: {seed: 3}\n")
    recipe = load_recipe(tmp_path / "other.yaml")
    assert (recipe.schedule.max_steps, recipe.training.seed) == (7, 3)
    assert recipe.schedule.warmup_steps == load_recipe("quickstart").schedule.warmup_steps


def test_a_circle_of_recipes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["data: [", "- a\n- b", ""])
def test_a_file_that_is_no_recipe_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_copy_is_the_same_text_and_is_not_overwritten(tmp_path: Path) -> None:
    copied = copy_recipe("recovery", tmp_path)
    assert copied == tmp_path / "recovery.yaml"
    assert copied.read_text() == recipe_text("recovery")
    with pytest.raises(RecipeError, match="exists already"):
        copy_recipe("lpt", copied)
    assert load_recipe(copy_recipe("lpt", copied, force=True)) == load_recipe("lpt")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", training={"batch_sise": 2}, optimizer={"learning_rate": 0})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "training.batch_sise" in str(caught.value)
    assert "optimizer.learning_rate" in str(caught.value)
