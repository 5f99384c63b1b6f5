"""`finetune` end to end on the real models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from statex.checkpoints import open_checkpoint
from statex.errors import RecipeError, StatexError
from statex.models import load
from statex.recipes import finetune, load_recipe
from statex.recipes.reporting import read_log
from statex.recipes.trainer import accumulation_steps

from .helpers import (
    log_without_times,
    run,
    tensors,
    write_byte_gla,
    write_byte_mamba2,
    write_documents,
    write_lifted,
    write_recipe,
    write_widened,
)

# --- learning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_byte_gla, write_byte_mamba2])
def test_a_small_text_is_learnt_by_heart(tmp_path: Path, text: Path, write: Any) -> None:
    result = run(
        write(tmp_path / "model"),
        text,
        tmp_path / "out",
        data={"mixture": [{"kind": "text"}]},
        schedule={"max_steps": 60, "warmup_steps": 3, "min_ratio": 0.1},
        training={"batch_size": 4, "save_every": 100},
    )
    losses = [row["loss"] for row in read_log(result.log)]
    assert losses[0] > 4
    assert losses[-1] < 1.5


def test_gradients_of_a_step_do_not_depend_on_how_it_is_split(tmp_path: Path, base: Path, text: Path) -> None:
    logs = []
    for name, batch, accumulation in (("whole", 4, 1), ("split", 1, 4)):
        training = {"batch_size": batch, "gradient_accumulation": accumulation, "save_every": 10}
        run(base, text, tmp_path / name, training=training)
        logs.append(log_without_times(tmp_path / name))
    for whole, split in zip(*logs, strict=True):
        assert split == pytest.approx(whole, rel=1e-4)


def test_bf16_autocast_trains_fp32_masters(tmp_path: Path, base: Path, text: Path) -> None:
    result = run(base, text, tmp_path / "out", training={"batch_size": 2, "precision": "bf16", "save_every": 3})
    fp32 = run(base, text, tmp_path / "fp32", training={"batch_size": 2, "precision": "fp32", "save_every": 3})
    assert result.final_loss != fp32.final_loss
    assert result.final_loss == pytest.approx(fp32.final_loss, rel=0.05)
    assert {tensor.dtype for tensor in tensors(tmp_path / "out/checkpoints/step-3").values()} == {torch.float32}


def test_held_out_loss_is_told_before_and_after(tmp_path: Path, base: Path, text: Path) -> None:
    held_out = write_documents(tmp_path / "held_out.jsonl", ["the cat ate the log. " * 5])
    recipe = write_recipe(tmp_path / "r.yaml", evaluation={"tokens": 64, "every": 4}, schedule={"max_steps": 12})
    result = finetune(base, recipe, text, tmp_path / "out", held_out=held_out, device="cpu", progress=False)
    told = {int(row["step"]): row["eval_loss"] for row in read_log(result.log) if "eval_loss" in row}
    assert list(told) == [0, 4, 8, 12]
    assert result.eval_before == pytest.approx(told[0])
    assert result.eval_after == pytest.approx(told[12])
    assert told[12] < told[0]


# --- what is written -----------------------------------------------------------------------------------------------------


def test_the_result_keeps_names_dtypes_description_and_tokenizer(tmp_path: Path, base: Path, text: Path) -> None:
    lifted = write_lifted(tmp_path / "lifted", base)
    run(lifted, text, tmp_path / "out")
    before, after = open_checkpoint(lifted), open_checkpoint(tmp_path / "out")
    assert after.tensors == before.tensors
    assert after.tensors["model.layers.0.mixer.lift_gamma"].dtype == "float32"
    assert after.tensors["model.layers.0.mixer.q_proj.weight"].dtype == "bfloat16"
    assert after.description == before.description
    assert after.source_config == before.source_config
    assert {key: after.provenance[key] for key in ("new", "expanded", "plan")} == before.provenance
    assert after.provenance["finetune"][0]["steps"] == 6
    assert [path.read_bytes() for path in after.carried_files] == [path.read_bytes() for path in before.carried_files]
    assert any((after.load(name) != before.load(name)).any() for name in after.tensors)
    assert load(tmp_path / "out").generate(torch.tensor([[70, 71]]), max_new_tokens=2).shape == (1, 4)


def test_the_result_can_be_fine_tuned_again(tmp_path: Path, base: Path, text: Path) -> None:
    run(base, text, tmp_path / "once")
    run(tmp_path / "once", text, tmp_path / "twice")
    assert len(open_checkpoint(tmp_path / "twice").provenance["finetune"]) == 2


def test_a_run_leaves_its_recipe_log_events_and_two_checkpoints(tmp_path: Path, base: Path, text: Path) -> None:
    result = run(base, text, tmp_path / "out", schedule={"max_steps": 9})
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-8", "step-9"]
    assert load_recipe(out / "recipe.yaml").data.mixture[0].model_dump()["path"] == str(text)
    assert list((out / "tensorboard").iterdir())
    rows = read_log(result.log)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[-1]["tokens"] == result.tokens == 9 * 2 * 2 * 32
    assert all(row["grad_norm"] > 0 and row["tokens_per_s"] > 0 for row in rows)
    assert "9" in (out / "README.md").read_text()


def test_the_log_tells_how_far_what_surgery_added_has_opened(tmp_path: Path, base: Path, text: Path) -> None:
    lifted = write_lifted(tmp_path / "lifted", base)
    multipliers = {"new": 10.0}
    result = run(lifted, text, tmp_path / "out", schedule={"max_steps": 4}, optimizer={"multipliers": multipliers})
    told = [row["opened"] for row in read_log(result.log)]
    gamma = tensors(tmp_path / "out")["model.layers.0.mixer.lift_gamma"]
    assert 0 < told[0] < told[-1]
    assert told[-1] == pytest.approx(float(gamma.double().square().mean().sqrt()), rel=1e-6)
    plain = run(base, text, tmp_path / "plain", schedule={"max_steps": 1})
    assert all("opened" not in row for row in read_log(plain.log))


def test_faster_rows_change_the_run_and_not_where_it_starts_and_the_card_tells_them(tmp_path: Path, base: Path, text: Path) -> None:
    wide, held_out = write_widened(tmp_path / "wide", base), {"mixture": [{"kind": "mqar", "num_pairs": [2]}], "tokens": 64}
    narrow, plain, fast = (
        run(model, text, tmp_path / name, evaluation=held_out, optimizer={"multipliers": {"rows": rows}})
        for name, model, rows in (("narrow", base, 10.0), ("plain", wide, 1.0), ("fast", wide, 10.0))
    )
    assert narrow.eval_before == pytest.approx(fast.eval_before, rel=1e-6)
    assert plain.eval_before == fast.eval_before
    assert plain.eval_after != fast.eval_after
    assert "(new ×1, expanded ×1, rows ×10, rest ×1)" in (tmp_path / "fast/README.md").read_text()


# --- bad input -----------------------------------------------------------------------------------------------------------


def bad_inputs(tmp_path: Path, base: Path) -> dict[str, dict[str, Any]]:
    bare = write_byte_gla(tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    (tmp_path / "empty.jsonl").write_text("")
    return {
        "no such folder": {"checkpoint": tmp_path / "absent"},
        "does not exist": {"data": tmp_path / "absent.jsonl"},
        "empty": {"data": tmp_path / "empty.jsonl"},
        "leaves its text open": {"data": None},
        "holds no tokenizer": {"checkpoint": bare},
        "the tokenizer has 259 tokens, the model 200": {"checkpoint": write_byte_gla(tmp_path / "small", vocab_size=200)},
        "no whole number of batches": {"overrides": ["training.gradient_accumulation=null", "training.tokens_per_step=100"]},
        "unknown key": {"overrides": ["optimizer.learning_rat=1"]},
        "would overwrite": {"out": base},
        "no run to resume": {"resume": True, "recipe": None, "data": None},
    }


BAD = ["no such", "does not", "empty", "leaves", "holds no", "the tokenizer has", "no whole", "unknown key", "would", "no run"]


@pytest.mark.parametrize("told", BAD)
def test_bad_input_is_told_in_one_message_and_writes_nothing(tmp_path: Path, base: Path, text: Path, told: str) -> None:
    out = tmp_path / "out"
    arguments = {"checkpoint": base, "recipe": write_recipe(tmp_path / "r.yaml"), "data": text, "out": out}
    expected, changes = next(item for item in bad_inputs(tmp_path, base).items() if item[0].startswith(told))
    before = sorted(base.iterdir())
    with pytest.raises(StatexError, match=expected) as caught:
        finetune(**{**arguments, **changes}, device="cpu", progress=False)  # type: ignore[arg-type]
    assert caught.value.fix
    assert not out.exists()
    assert sorted(base.iterdir()) == before


def test_an_earlier_run_is_overwritten_only_when_forced(tmp_path: Path, base: Path, text: Path) -> None:
    run(base, text, tmp_path / "out")
    with pytest.raises(RecipeError, match="--force"):
        run(base, text, tmp_path / "out")
    finetune(base, tmp_path / "out.yaml", text, tmp_path / "out", force=True, device="cpu", progress=False)
    assert read_log(tmp_path / "out/log.csv")[-1]["step"] == 6


@pytest.mark.parametrize("name", ["text.jsonl", "recipe.yaml"])
def test_force_never_removes_what_the_run_reads(tmp_path: Path, base: Path, text: Path, name: str) -> None:
    run(base, text, tmp_path / "out")
    paths = {"text.jsonl": text, "recipe.yaml": tmp_path / "out.yaml"}
    inside = tmp_path / "out" / name
    inside.write_bytes(paths[name].read_bytes())
    paths[name] = inside
    with pytest.raises(RecipeError, match="lies in the folder to overwrite"):
        finetune(base, paths["recipe.yaml"], paths["text.jsonl"], tmp_path / "out", force=True, device="cpu", progress=False)
    assert inside.is_file()


def test_force_never_removes_a_folder_that_no_run_wrote(tmp_path: Path, base: Path, text: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="not written by a fine-tuning run"):
        finetune(base, write_recipe(tmp_path / "r.yaml"), text, tmp_path / "thesis", force=True, device="cpu", progress=False)
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"


def test_several_texts_share_the_weight_of_the_open_entry(tmp_path: Path, base: Path, text: Path) -> None:
    other = write_documents(tmp_path / "other.jsonl", ["more words " * 9])
    recipe = write_recipe(tmp_path / "r.yaml", schedule={"max_steps": 1})
    finetune(base, recipe, [text, other], tmp_path / "out", device="cpu", progress=False)
    mixture = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["data"]["mixture"]
    assert [(entry["kind"], entry.get("path"), entry["weight"]) for entry in mixture] == [
        ("text", str(text), 0.5),
        ("text", str(other), 0.5),
        ("mqar", None, 1.0),
    ]


def test_accumulation_follows_from_tokens_and_devices(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", training={"batch_size": 2, "tokens_per_step": 512, "gradient_accumulation": None})
    assert [accumulation_steps(load_recipe(path), devices) for devices in (1, 2, 4)] == [8, 4, 2]


def test_the_config_of_the_result_is_json_that_names_the_run(tmp_path: Path, base: Path, text: Path) -> None:
    run(base, text, tmp_path / "out", schedule={"max_steps": 1})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "statex"
    entry = config["statex"]["provenance"]["finetune"][0]
    assert entry["source"] == str(base)
    assert set(entry["source_sha256"]) == {"config.json", "model.safetensors"}
