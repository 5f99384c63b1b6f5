"""merge_heads: what each init does to the tensors and the description, and where it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from statex.checkpoints import open_checkpoint
from statex.errors import PlanError
from tests.surgery.helpers import GLA_VARIANTS, LIFT, MERGE, expand, largest_difference, provenance, tensors, write


def description(path: Path, layer: int = 0) -> Any:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.description.layers[layer]


@pytest.mark.parametrize("mixing", ["scalar", "channel"])
def test_preserve_adds_identity_mixing_and_nothing_else(tmp_path: Path, mixing: str) -> None:
    base = write("gla", tmp_path / "base")
    expand(base, tmp_path / "out", {**MERGE, "factor": 2, "mixing": mixing})
    before, after = tensors(base), tensors(tmp_path / "out")
    assert set(after) - set(before) == {f"model.layers.{i}.mixer.mixing" for i in range(2)}
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = torch.eye(2) if mixing == "scalar" else torch.eye(2).repeat_interleave(4, dim=0)
    assert torch.equal(after["model.layers.0.mixer.mixing"], expected.expand(2, -1, -1))


def test_preserve_keeps_scale_and_norm_groups_of_the_source(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    expand(base, tmp_path / "out", MERGE)
    layer, source = description(tmp_path / "out"), description(base)
    assert (layer.query_heads, layer.key_heads, layer.value_heads, layer.blocks) == (1, 1, 1, 4)
    assert (layer.key_dim, layer.value_dim) == (16, 32)
    assert (layer.scale, layer.norm_groups) == (source.scale, source.norm_groups) == (4**-0.5, 4)


def test_grouped_queries_regroup_so_that_merged_heads_share_no_keys(tmp_path: Path) -> None:
    """Query head (m, i, g) of 8 becomes (m, g, i): with 4 kv heads merged by 2, heads 0 1 | 2 3 become 0 2 | 1 3."""
    base = write("gla", tmp_path / "base", **GLA_VARIANTS["four of eight kv heads, short conv"])
    expand(base, tmp_path / "out", {**MERGE, "factor": 2})
    before, after = tensors(base), tensors(tmp_path / "out")
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    for part, axis in {"q_proj": 0, "q_conv1d": 0, "g_proj": 0, "o_proj": 1}.items():
        name = f"model.layers.0.mixer.{part}.weight"
        old = before[name].unflatten(axis, (8, -1)).index_select(axis, torch.tensor(order)).flatten(axis, axis + 1)
        assert torch.equal(after[name], old), part
    for part in ("k_proj", "v_proj", "gk_proj.1", "k_conv1d", "v_conv1d", "g_norm"):
        name = f"model.layers.0.mixer.{part}.weight"
        assert torch.equal(after[name], before[name]), part
    assert provenance(tmp_path / "out")["expanded"] == []


def test_inherit_equals_native_gla_with_fewer_heads(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", use_short_conv=True)
    expand(base, tmp_path / "out", {**MERGE, "factor": 2, "init": "inherit"})
    config = json.loads((base / "config.json").read_text()) | {"num_heads": 2}
    stock = tmp_path / "stock"
    stock.mkdir()
    (stock / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file

    weights = load_file(base / "model.safetensors")
    save_file({name: t.repeat(2) if ".g_norm" in name else t for name, t in weights.items()}, stock / "model.safetensors")
    assert description(tmp_path / "out") == description(stock)
    assert largest_difference(tmp_path / "out", stock) < 1e-12


def test_inherit_touches_the_output_norm_only(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    expand(base, tmp_path / "out", {**MERGE, "init": "inherit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed == provenance(tmp_path / "out")["expanded"] == [f"model.layers.{i}.mixer.g_norm.weight" for i in range(2)]
    assert torch.equal(after[changed[0]], before[changed[0]].repeat(4))
    assert description(tmp_path / "out").scale == 16**-0.5


def test_reinit_draws_the_mixer_and_its_norm_and_nothing_else(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", use_short_conv=True, num_kv_heads=2)
    expand(base, tmp_path / "out", {**MERGE, "layers": [1], "init": "reinit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in after if after[name].shape != before[name].shape or not torch.equal(after[name], before[name])}
    named = {name for name in before if name.startswith("model.layers.1.mixer")}
    assert changed == named == set(provenance(tmp_path / "out")["expanded"])
    assert set(after) == set(before)


def test_reinit_follows_the_familys_init(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", hidden_size=128)
    expand(base, tmp_path / "out", {**MERGE, "init": "reinit"})
    after = tensors(tmp_path / "out")
    q = after["model.layers.0.mixer.q_proj.weight"]
    bound = 2**-2.5 * (6 / sum(q.shape)) ** 0.5
    assert bound * 0.99 < float(q.abs().max()) <= bound
    assert not bool(after["model.layers.0.mixer.gk_proj.1.bias"].any())
    assert torch.equal(after["model.layers.0.mixer.g_norm.weight"], torch.ones(128))
    assert torch.equal(after["model.layers.0.mixer_norm.weight"], torch.ones(128))


@pytest.mark.parametrize("variant", [{}, {"num_heads": 8, "num_kv_heads": 4}], ids=["plain", "grouped queries"])
@pytest.mark.parametrize("mixing", ["scalar", "channel"])
def test_merging_twice_equals_merging_once(tmp_path: Path, variant: dict[str, Any], mixing: str) -> None:
    base = write("gla", tmp_path / "base", **variant)
    expand(base, tmp_path / "half", {**MERGE, "factor": 2, "mixing": mixing})
    expand(tmp_path / "half", tmp_path / "whole", {**MERGE, "factor": 2, "mixing": mixing})
    expand(base, tmp_path / "at once", {**MERGE, "factor": 4, "mixing": mixing})
    once, twice = tensors(tmp_path / "at once"), tensors(tmp_path / "whole")
    assert description(tmp_path / "whole") == description(tmp_path / "at once")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_merging_a_trained_mixing_keeps_the_function(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    expand(base, tmp_path / "half", {**MERGE, "factor": 2, "mixing": "scalar"})
    from safetensors.torch import load_file

    file = next((tmp_path / "half").glob("*.safetensors"))
    weights = load_file(file)
    for name in [name for name in weights if name.endswith("mixing")]:
        weights[name] += torch.randn(weights[name].shape)
    save_file(weights, file, metadata={"format": "pt"})
    for mixing in ("scalar", "channel"):
        expand(tmp_path / "half", tmp_path / mixing, {**MERGE, "factor": 2, "mixing": mixing})
        assert largest_difference(tmp_path / "half", tmp_path / mixing) < 1e-10


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (None, {**MERGE, "factor": 3}, "factor 3 does not divide its 4 key/value heads"),
        (None, {**MERGE, "factor": 1}, "factor 1 does not enlarge"),
        (MERGE, MERGE, "nothing to merge"),
        (LIFT, {**MERGE, "factor": 2}, "keys are lifted"),
        ({**MERGE, "factor": 2}, {**MERGE, "factor": 2, "init": "inherit"}, "cannot keep this layer's mixing"),
        ({**MERGE, "factor": 2}, {**MERGE, "factor": 2, "mixing": "scalar"}, "per channel already"),
    ],
)
def test_what_is_not_defined_is_refused_with_layer_and_remedy(
    tmp_path: Path, first: dict[str, Any] | None, second: dict[str, Any], words: str
) -> None:
    base = write("gla", tmp_path / "base")
    if first is not None:
        expand(base, tmp_path / "first", first)
        base = tmp_path / "first"
    with pytest.raises(PlanError, match=words) as caught:
        expand(base, tmp_path / "out", second)
    assert caught.value.where == "layer 0"
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_odd_head_counts_name_the_factors_that_work(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", hidden_size=48, num_heads=6, expand_k=1.0)
    with pytest.raises(PlanError, match="Use 2 or 3 or 6"):
        expand(base, tmp_path / "out", {**MERGE, "factor": 4})
    expand(base, tmp_path / "out", {**MERGE, "factor": 3})
    assert largest_difference(base, tmp_path / "out") < 1e-10
