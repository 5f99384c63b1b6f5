"""Carrying out a plan: what is written, what is read, what is left when something goes wrong."""

import hashlib
import io
import json
import math
import re
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import statex
from statex.checkpoints import Checkpoint, CheckpointWriter, inspect_checkpoint, open_checkpoint
from statex.errors import CheckpointError, PlanError
from statex.surgery import expand_checkpoint, resolve_plan
from tests.surgery.helpers import LIFT, MERGE, WIDEN, expand, largest_difference, provenance, tensors, tokens, write

GROWTH = {"gla": {**MERGE, "factor": 2}, "mamba2": {**WIDEN, "factor": 2}}


def headers(folder: Path) -> list[dict[str, Any]]:
    """The headers of a folder's safetensors files."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            found.append(json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0])))
    return found


def test_options_mean_the_same_as_the_plan_that_they_make(tmp_path: Path) -> None:
    base = write("mamba2", tmp_path / "base")
    expand_checkpoint(base, tmp_path / "a", operator="widen_state", factor=2, layers="1", init="reinit", seed=3, progress=False)
    expand_checkpoint(base, tmp_path / "b", plan_file=tmp_path / "a" / "plan.yaml", progress=False)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_default_is_the_papers_plan_with_init_preserve(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", num_hidden_layers=7)
    summary = expand_checkpoint(base, tmp_path / "out", progress=False)
    assert [(row.layer, row.operator, row.factor, row.init) for row in summary.rows] == [
        (0, "merge_heads", 4, "preserve"),
        (6, "merge_heads", 4, "preserve"),
    ]
    assert largest_difference(base, tmp_path / "out") < 1e-10


@pytest.mark.parametrize("family", ["gla", "mamba2"])
@pytest.mark.parametrize("init", ["preserve", "reinit"])
def test_draws_depend_on_seed_and_name_only(tmp_path: Path, family: str, init: str) -> None:
    base = write(family, tmp_path / "base", num_hidden_layers=3)
    growth = {**GROWTH[family], "init": init}
    expand(base, tmp_path / "all", growth)
    expand(base, tmp_path / "one", {**growth, "layers": [2]})
    expand(base, tmp_path / "other seed", growth, seed=1)
    whole, alone, other = (tensors(tmp_path / name) for name in ("all", "one", "other seed"))
    last = [name for name in whole if name.startswith("model.layers.2.")]
    assert all(torch.equal(whole[name], alone[name]) for name in last)
    drawn = family == "mamba2" or init == "reinit"
    assert all(torch.equal(whole[name], other[name]) for name in last) is not drawn
    assert not torch.equal(whole["model.layers.1.mixer_norm.weight"], alone["model.layers.2.mixer_norm.weight"]) or init == "reinit"


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_two_layers_never_share_their_draws(tmp_path: Path, family: str) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "out", {**GROWTH[family], "init": "reinit"})
    out, name = tensors(tmp_path / "out"), {"gla": "mixer.q_proj.weight", "mamba2": "mixer.conv1d.weight"}[family]
    start = 0 if family == "gla" else 64
    assert not torch.equal(out[f"model.layers.0.{name}"][start:], out[f"model.layers.1.{name}"][start:])


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_a_dry_run_reads_no_tensor_writes_nothing_and_tells_the_same(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write(family, tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load", lambda self, name: pytest.fail(f"read {name}"))
        dry = expand_checkpoint(base, None, {"operations": [GROWTH[family], LIFT]}, dry_run=True)
    assert list(tmp_path.iterdir()) == [base]
    wet = expand(base, tmp_path / "out", GROWTH[family], LIFT).to_dict()
    assert dry.to_dict() == {**wet, "out": None}


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_every_tensor_is_read_once_and_held_alone(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is one tensor's and what surgery makes of it, not the checkpoint's."""
    base = write(family, tmp_path / "base", num_hidden_layers=12)
    read: list[str] = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: read.append(name) or load(self, name))
    live: list[int] = []
    alive: dict[int, Any] = {}
    add = CheckpointWriter.add

    def counted(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        alive[id(tensor)] = weakref.ref(tensor)
        live.append(sum(ref() is not None for ref in alive.values()))
        add(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", counted)
    expand(base, tmp_path / "out", GROWTH[family], LIFT)
    with open_checkpoint(base) as checkpoint:
        assert sorted(read) == sorted(checkpoint.tensors)
    assert max(live) == 1


def test_provenance_says_plan_tensors_source_hashes_and_versions(tmp_path: Path) -> None:
    base = write("mamba2", tmp_path / "base")
    summary = expand(base, tmp_path / "out", GROWTH["mamba2"], LIFT, seed=4)
    told = provenance(tmp_path / "out")
    assert told["plan"] == summary.plan == yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    assert told["plan"]["seed"] == 4
    assert told["new"] == [f"model.layers.{i}.mixer.lift_gamma" for i in range(2)]
    assert all(re.fullmatch(r"model\.layers\.\d\.mixer\.(in_proj|conv1d)\.(weight|bias)", name) for name in told["expanded"])
    assert told["source"] == str(base)
    assert told["source_sha256"]["model.safetensors"] == hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert (told["statex_version"], told["torch_version"]) == (statex.__version__, torch.__version__)
    metadata = headers(tmp_path / "out")[0]["__metadata__"]
    assert metadata["format"] == "pt"
    assert yaml.safe_load(metadata["statex_plan"]) == told["plan"]


def test_config_keeps_the_sources_keys_and_the_source_config_itself(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    expand(base, tmp_path / "out", MERGE)
    source = json.loads((base / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "statex"
    assert config["statex"]["source_config"] == source
    assert all(config[key] == value for key, value in source.items() if key not in ("model_type", "architectures"))


def test_tokenizer_files_come_along_and_the_card_says_what_was_done(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "README.md").write_text("the source's own card")
    expand(base, tmp_path / "out", {**MERGE, "factor": 2}, LIFT)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: statex\n")
    rows = ["merge_heads ×2, preserve", "lift_keys ×2, preserve", "4 × [4, 8] → 2 × [8, 16]"]
    for words in ("computes the same function", "statex.load(", "sha256", *rows):
        assert words in card, words
    assert "the source's own card" not in card


def test_the_card_of_a_reinit_warns(tmp_path: Path) -> None:
    expand(write("gla", tmp_path / "base"), tmp_path / "out", {**MERGE, "init": "reinit"})
    assert "needs training before use" in (tmp_path / "out" / "README.md").read_text()


def test_expanding_again_remembers_what_was_new_and_where_it_came_from(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    expand(base, tmp_path / "once", {**MERGE, "factor": 2})
    expand(tmp_path / "once", tmp_path / "twice", LIFT)
    first, second = provenance(tmp_path / "once"), provenance(tmp_path / "twice")
    assert set(first["new"]) < set(second["new"])
    assert second["previous"] == first
    assert largest_difference(base, tmp_path / "twice") < 1e-10


@pytest.mark.parametrize("moment", ["first", "last"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    base = write("mamba2", tmp_path / "base")
    stop = "model.embeddings.weight" if moment == "first" else "model.layers.1.mixer.lift_gamma"
    add = CheckpointWriter.add

    def failing(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        if name == stop:
            raise error
        add(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", failing)
    with pytest.raises((KeyboardInterrupt, CheckpointError, OSError)):
        expand(base, tmp_path / "out", LIFT)
    assert list(tmp_path.iterdir()) == [base]


def test_an_existing_folder_needs_force_and_the_source_is_never_replaced(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    expand(base, tmp_path / "out", LIFT)
    with pytest.raises(CheckpointError):
        expand(base, tmp_path / "out", MERGE)
    assert "lift_keys" in (tmp_path / "out" / "plan.yaml").read_text()
    expand(base, tmp_path / "out", MERGE, force=True)
    assert "merge_heads" in (tmp_path / "out" / "plan.yaml").read_text()
    before = tensors(base)
    with pytest.raises(CheckpointError):
        expand(base, base, MERGE, force=True)
    assert all(torch.equal(before[name], value) for name, value in tensors(base).items())


def test_a_refused_plan_touches_no_disk(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    with pytest.raises(PlanError):
        expand(base, tmp_path / "out", {**MERGE, "factor": 2}, {**LIFT, "factor": 99})
    assert list(tmp_path.iterdir()) == [base]


def test_a_quantised_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="GPTQ"):
        expand(base, tmp_path / "out", LIFT)


@pytest.mark.parametrize("variant", [{}, {"use_short_conv": True, "num_kv_heads": 2}], ids=["plain", "convolutions"])
def test_gla_state_accounting_equals_the_cache(tmp_path: Path, variant: dict[str, Any]) -> None:
    _compare_with_cache(write("gla", tmp_path / "base", **variant), tmp_path / "out", [{**MERGE, "layers": [1], "factor": 2}, LIFT])


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_state_accounting_equals_the_cache(tmp_path: Path, groups: int) -> None:
    base = write("mamba2", tmp_path / "base", n_groups=groups)
    _compare_with_cache(base, tmp_path / "out", [{**WIDEN, "layers": [0], "factor": 3}, LIFT])


def _compare_with_cache(base: Path, out: Path, plan: list[dict[str, Any]]) -> None:
    summary = expand(base, out, *plan)
    for path, cost in ((base, summary.before), (out, summary.after)):
        cache = statex.load(path)(tokens(batch=1), use_cache=True).past_key_values
        assert cache.nbytes == cost.state_bytes == inspect_checkpoint(path).state_bytes
        held = [state for layer in cache.layers for state in (layer.recurrent, *layer.conv.values())]
        assert sum(state.numel() for state in held) == cost.state_elements == inspect_checkpoint(path).state_elements
        assert inspect_checkpoint(path).parameters == cost.parameters == sum(p.numel() for p in statex.load(path).parameters())


def test_decode_traffic_is_weights_once_and_the_state_twice(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", dtype=torch.bfloat16)
    summary = expand(base, tmp_path / "out", MERGE, dry_run=True)
    stored = {name: math.prod(t.shape) * t.element_size() for name, t in tensors(base).items()}
    row = stored["model.embeddings.weight"] // 48
    weights = sum(stored.values()) - stored["model.embeddings.weight"] + row
    assert summary.before.decode_bytes == weights + 2 * summary.before.state_bytes
    mixing = 2 * 16 * 4 * 4
    assert summary.after.decode_bytes == weights + mixing + 2 * 4 * summary.before.state_bytes


def test_a_tied_table_is_read_whole_for_every_token(tmp_path: Path) -> None:
    tied = expand(write("gla", tmp_path / "tied", tie_word_embeddings=True), tmp_path / "out", LIFT, dry_run=True)
    untied = expand(write("gla", tmp_path / "untied"), tmp_path / "out", LIFT, dry_run=True)
    assert untied.before.weight_bytes - tied.before.weight_bytes == 32 * 4


def test_a_plan_that_was_resolved_before_may_be_passed_itself_or_as_its_file(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    with open_checkpoint(base) as checkpoint:
        plan = resolve_plan(checkpoint, operator="lift_keys", factor=2)
    assert expand_checkpoint(base, None, plan, dry_run=True).plan == plan.to_dict()
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    assert expand_checkpoint(base, None, str(tmp_path / "plan.yaml"), dry_run=True).plan == plan.to_dict()


def test_the_table_shows_every_row_and_the_totals(tmp_path: Path) -> None:
    from rich.console import Console

    summary = expand(write("gla", tmp_path / "base", num_kv_heads=2), tmp_path / "out", MERGE, LIFT, dry_run=True)
    console = Console(width=200, file=io.StringIO())
    console.print(summary.table())
    text = console.file.getvalue()
    assert "2 × [4, 8] (4 queries) → 1 × [8, 16] (2 queries)" in text
    assert text.count("merge_heads ×2, preserve") == text.count("lift_keys ×2, preserve") == 2
    assert f"{summary.before.state_elements:,} → {summary.after.state_elements:,}" in text
    assert f"state ×{summary.state_growth:.2f}" in text
    json.dumps(summary.to_dict())
