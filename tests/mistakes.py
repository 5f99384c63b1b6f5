"""Mistakes for test_cli.py: checkpoints to spoil, and calls that cannot be carried out in its working directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from statex import cli
from tests.fixtures import write_hgrn2, write_mamba1_ssm

QUICKSTART = Path(cli.__file__).parent / "assets" / "gla-quickstart"
TINY = ("--tasks", "mqar", "--num-pairs", "2", "--samples", "1")
SHORT = [
    "--recipe=quickstart", "--data=good.txt", "--device=cpu", "--set=schedule.max_steps=2", "--set=data.sequence_length=32",
    "--set=data.mixture.1.num_pairs=[2]", "--set=training.batch_size=1",
]  # fmt: skip


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def name_absent_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def empty_index(folder: Path) -> None:
    name_absent_shards(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def contradict_heads(folder: Path) -> None:
    write_hgrn2(folder)
    edit_config(folder, num_heads=3)


def cut_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = write_mamba1_ssm(folder) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot read config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{no"), "not valid JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "truncated": (cut, "truncated"),
    "truncated pickle": (cut_pickle, "truncated or broken weight file"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "the file has 0 bytes"),
    "LFS pointer": (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), "git lfs pull"),
    "absent shards": (name_absent_shards, "model-00001-of-00002.safetensors"),
    "index of nothing": (empty_index, "weight_map"),
    "missing tensor": (lambda folder: change_tensors(folder, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "extra tensor": (lambda folder: change_tensors(folder, lambda t: t.update(ghost=torch.ones(2))), "ghost"),
    "int8": (lambda folder: change_tensors(folder, lambda t: t.update({"lm_head.weight": torch.ones(3).char()})), "int8"),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"quant_method": "awq"}), "AWQ"),
    "other shapes": (lambda folder: edit_config(folder, vocab_size=99), "vocab_size means 99"),
    "more layers": (lambda folder: edit_config(folder, num_hidden_layers=10**30), "num_hidden_layers"),
    "odd heads": (lambda folder: edit_config(folder, num_heads=3), "multiple of num_heads (3)"),
    "contradicting heads": (contradict_heads, "num_heads (3) contradicts expand_ratio (8)"),
    "infinite keys": (lambda folder: edit_config(folder, expand_k=float("inf")), "expand_k"),
    "other family": (lambda folder: edit_config(folder, model_type="llama"), "Supported are"),
    "other dialect": (lambda folder: edit_config(folder, model_type=None, ssm_cfg="x"), "Supported are"),
}  # fmt: skip


BAD_CALLS: dict[str, tuple[list[str], str]] = {
    "missing checkpoint": (["inspect", "./nowhere"], "no such folder"),
    "a file": (["inspect", "good.txt"], "folder"),
    "no out": (["expand", "gla"], "-o OUT"),
    "factor does not divide": (["expand", "gla", "-o", "out", "--factor", "3"], "Use 2 or 4"),
    "factor 0": (["expand", "gla", "-o", "out", "--factor", "0"], "2 or more"),
    "factor far too large": (["expand", "mamba2", "-o", "out", "--factor", "100000000000"], "the disk is too full"),
    "layer out of range": (["expand", "gla", "-o", "out", "--layers", "3"], "layers 0 to 2"),
    "no list of layers": (["expand", "gla", "-o", "out", "--layers", "a"], "every:6"),
    "unknown operator": (["expand", "gla", "-o", "out", "--operator", "mergeheads"], "did you mean 'merge_heads'"),
    "operator of another family": (["expand", "mamba2", "-o", "out", "--operator", "merge_heads"], "widen_state"),
    "vector operator on matrices": (["expand", "gla", "-o", "out", "--operator", "outer_product"], "merge_heads"),
    "auto of no operator": (
        ["expand", str(QUICKSTART), "-o", "out", "--layers", "auto", "--operator", "lift_kyes"], "did you mean 'lift_keys'"
    ),
    "spectrum twice in a plan": (["expand", "gla", "-o", "out", "--plan", "twice.yaml"], "named twice for extend_spectrum"),
    "spectrum extended already": (["expand", "flipping", "-o", "out", "--operator", "extend_spectrum"], "extended already"),
    "factor of a spectrum": (["expand", "gla", "-o", "out", "--operator", "extend_spectrum", "--factor", "2"], "size alone"),
    "unknown init": (["expand", "gla", "-o", "out", "--init", "zero"], "preserve"),
    "negative seed": (["expand", "gla", "-o", "out", "--seed=-1"], "seed"),
    "set nothing": (["expand", "gla", "-o", "out", "--set", "mixing"], "KEY=VALUE"),
    "set no YAML": (["expand", "gla", "-o", "out", "--set", "mixing=[1"], "KEY=VALUE"),
    "unknown option": (["expand", "gla", "-o", "out", "--set", "mix=1"], "Known keys"),
    "plan with unknown key": (["expand", "gla", "-o", "out", "--plan", "key.yaml"], "did you mean 'operator'"),
    "plan that is no YAML": (["expand", "gla", "-o", "out", "--plan", "broken.yaml"], "not valid YAML"),
    "missing plan": (["expand", "gla", "-o", "out", "--plan", "none.yaml"], "Check the path"),
    "expanded already": (["expand", "expanded", "-o", "out"], "expanded already"),
    "out exists": (["expand", "gla", "-o", "expanded"], "--force"),
    "out is the source": (["expand", "gla", "-o", "gla", "--force"], "own source"),
    "out is no checkpoint": (["expand", "gla", "-o", "home", "--force"], "not a checkpoint"),
    "out under a file": (["expand", "gla", "-o", "good.txt/out"], "cannot write"),
    "verify nothing": (["verify", "gla", "expanded", "--max-tokens", "0"], "2 or more"),
    "verify in int8": (["verify", "gla", "expanded", "--dtype", "int8"], "float32"),
    "verify on no device": (["verify", "gla", "expanded", "--device", "meta"], "cpu"),
    "verify two vocabularies": (["verify", "gla", str(QUICKSTART)], "vocabularies"),
    "verify a missing text": (["verify", "gla", "expanded", "--data", "none.txt"], "no such data file"),
    "verify a broken parquet": (["verify", "gla", "expanded", "--data", "broken.parquet"], "complete parquet"),
    "verify without tokenizer folder": (["verify", "gla", "expanded", "--tokenizer", "./none"], "no such folder"),
    "no tokenizer": (["eval", "gla", *TINY], "no tokenizer"),
    "unknown task": (["eval", str(QUICKSTART), "--tasks", "mqr"], "Did you mean 'mqar'"),
    "empty task": (["eval", str(QUICKSTART), "--tasks", ""], "There are mqar"),
    "zero samples": (["eval", str(QUICKSTART), "--samples", "0"], "positive whole numbers"),
    "negative length": (["eval", str(QUICKSTART), "--lengths=-5"], "positive whole numbers"),
    "bad list": (["eval", str(QUICKSTART), "--lengths", "1;2"], "commas"),
    "bad depth": (["eval", str(QUICKSTART), "--tasks", "passkey", "--lengths", "128", "--depths", "2"], "outside 0 to 1"),
    "batch of 0": (["eval", str(QUICKSTART), *TINY, "--batch-size", "0"], "from 1"),
    "8-bit floats": (["eval", str(QUICKSTART), *TINY, "--dtype", "float8_e4m3fn"], "float32"),
    "more than memory": (["eval", str(QUICKSTART), "--tasks", "passkey", "--lengths", "99999999999999"], "memory"),
    "unknown suite": (["eval", str(QUICKSTART), "--suite", "recal"], "Did you mean 'recall'"),
    "questions without data": (["eval", str(QUICKSTART), "--tasks", "squad"], "--data-dir"),
    "questions elsewhere": (["eval", str(QUICKSTART), "--tasks", "nq", "--data-dir", "home"], "lost-in-the-middle"),
    "no data folder": (["eval", str(QUICKSTART), "--tasks", "nq", "--data-dir", "none"], "no such data folder"),
    "one needle": (["eval", str(QUICKSTART), "--tasks", "niah_multikey", "--needles", "1"], "from 2"),
    "no room for needles": (["eval", str(QUICKSTART), "--tasks", "niah_uuids", "--lengths", "64"], "Give lengths from"),
    "a haystack that is short": (["eval", str(QUICKSTART), "--tasks=niah", "--lengths=2048", "--data=good.txt"], "shorter lengths"),
    "shots below 0": (["eval", str(QUICKSTART), *TINY, "--shots=-1"], "whole numbers from 0"),
    "resume nothing": (["eval", str(QUICKSTART), *TINY, "-o", "out", "--resume"], "without --resume"),
    "resume nowhere": (["eval", str(QUICKSTART), *TINY, "--resume"], "--out"),
    "a task file that is not there": (["eval", str(QUICKSTART), "--lm-eval", "none.yaml"], "lm_eval"),
    "perplexity of nothing": (["eval", str(QUICKSTART), "--tasks", "perplexity"], "--data"),
    "eval out is a file": (["eval", str(QUICKSTART), *TINY, "-o", "good.txt"], "not a folder"),
    "one result": (["compare", "home"], "two results"),
    "no results": (["compare", "home", "home"], "statex eval"),
    "foreign JSON": (["compare", "old.json", "old.json"], "schema"),
    "unknown probe": (["diagnose", str(QUICKSTART), "--probe", "guess"], "mqar or copy"),
    "window of nothing": (["diagnose", str(QUICKSTART), "--window", "0"], "from 1"),
    "diagnosis without a tokenizer": (["diagnose", "gla"], "no tokenizer"),
    "diagnosis with an operator of others": (["diagnose", str(QUICKSTART), "--operator", "outer_product"], "merge_heads"),
    "auto without a tokenizer": (["expand", "gla", "-o", "out", "--layers", "auto"], "no tokenizer"),
    "report to nowhere": (["report", "home"], "-o FOLDER"),
    "report of no results": (["report", "home", "-o", "out"], "statex eval"),
    "card of two results": (["report", "home", "home", "--card", "gla"], "evaluation"),
    "empty prompt": (["generate", str(QUICKSTART), "-p", ""], "prompt is empty"),
    "no tokens": (["generate", str(QUICKSTART), "-p", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
    "negative temperature": (["generate", str(QUICKSTART), "-p", "a", "--temperature=-1"], "--temperature"),
    "no beams": (["generate", str(QUICKSTART), "-p", "a", "--num-beams", "0"], "--num-beams"),
    "another tokenizer": (["generate", "gla", "-p", "zz", "--tokenizer", str(QUICKSTART)], "token id 125"),
    "unknown format": (["export", "gla", "-o", "out", "--to", "gguf"], "--to native"),
    "dialect of remote code": (["export", "gla", "-o", "out", "--dialect", "fla"], "--to native"),
    "dialect of another family": (["export", "gla", "-o", "out", "--to", "native", "--dialect", "mamba_ssm"], "fla"),
    "new tensors in a stock checkpoint": (["export", "expanded", "-o", "out", "--to", "native"], "mixer.mixing"),
    "quickstart into a full folder": (["quickstart", "-o", "home"], "not empty"),
    "unknown recipe": (["recipes", "show", "recovry"], "Did you mean 'recovery'"),
    "recipe with unknown key": (["recipes", "validate", "recipe.yaml"], "optimizer.learning_rate"),
    "recipe in a circle": (["recipes", "validate", "loop.yaml"], "extends itself"),
    "recipe that is no YAML": (["recipes", "validate", "broken.yaml"], "not valid YAML"),
    "recipe that is a list": (["recipes", "validate", "list.yaml"], "mapping"),
    "recipe that is no text": (["recipes", "validate", "latin.txt"], "UTF-8"),
    "copy onto a file": (["recipes", "copy", "recovery", "good.txt"], "--force"),
    "copy under a file": (["recipes", "copy", "recovery", "good.txt/mine.yaml"], "cannot write"),
    "finetune without data": (["finetune", str(QUICKSTART), "-o", "out"], "--data"),
    "finetune resumes nothing": (["finetune", str(QUICKSTART), "-o", "out", "--resume"], "without --resume"),
    "finetune onto its source": (["finetune", "expanded", "-o", "expanded", *SHORT, "--force"], "Choose another"),
    "finetune onto a foreign folder": (["finetune", str(QUICKSTART), "-o", "home", *SHORT, "--force"], "Remove it yourself"),
    "finetune on no device": (["finetune", str(QUICKSTART), "-o", "out", *SHORT, "--device", "tpu9"], "tpu9"),
    "unknown recipe key": (["finetune", str(QUICKSTART), "-o", "out", *SHORT, "--set", "optimizer.lerning_rate=1"], "Did you mean"),
    "impossible betas": (["finetune", str(QUICKSTART), "-o", "out", *SHORT, "--set", "optimizer.betas=[1, 1]"], "less than 1"),
    "seed beyond 64 bits": (["finetune", str(QUICKSTART), "-o", "out", *SHORT, "--set", f"training.seed={2**70}"], "training.seed"),
    "everything frozen": (["finetune", str(QUICKSTART), "-o", "out", *SHORT, "--set", "optimizer.multipliers.rest=0"], "above 0"),
    **{
        f"finetune on {name}": (["finetune", str(QUICKSTART), "-o", "out", *SHORT, "--data", name], word)
        for name, word in {
            "none.txt": "does not exist", "empty.txt": "no text", "latin.txt": "UTF-8", "table.csv": ".jsonl",
            "empty.jsonl": "empty", "numbers.jsonl": "no text", "other.jsonl": "body", "broken.jsonl": "complete",
            "broken.parquet": "complete", "home": "no data files",
        }.items()
    },
    **{
        f"perplexity of {name}": (["eval", str(QUICKSTART), "--tasks=perplexity", "--lengths=16", "--data", name], word)
        for name, word in {
            "empty.txt": "no text", "latin.txt": "UTF-8", "table.csv": ".jsonl", "numbers.jsonl": "line 1",
            "broken.jsonl": "line 2", "broken.txt.gz": "complete", "cut.txt.gz": "complete",
        }.items()
    },
}  # fmt: skip
