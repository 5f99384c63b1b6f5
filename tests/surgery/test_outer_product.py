"""outer_product: HGRN's vector becomes the diagonal of matrices, and what may be read of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import statex
from statex.checkpoints import export_native, open_checkpoint
from statex.errors import ExportError, PlanError
from tests.surgery.helpers import expand, largest_difference, logits, provenance, tensors, tokens, write

OUTER = {"operator": "outer_product", "layers": "all", "factor": 8}
CONVOLVED = {"use_short_conv": True, "conv_bias": True}


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, CONVOLVED, {"expand_ratio": 2}], ids=str)
def test_the_diagonal_of_the_matrices_is_hgrns_vector(tmp_path: Path, variant: dict[str, Any]) -> None:
    base = write("hgrn", tmp_path / "base", **variant)
    expand(base, tmp_path / "out", OUTER)
    vectors, matrices = (
        [layer.recurrent for layer in statex.load(path, dtype=torch.float64)(tokens(), use_cache=True).past_key_values.layers]
        for path in (base, tmp_path / "out")
    )
    for vector, matrix in zip(vectors, matrices, strict=True):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).flatten(1)
        assert torch.allclose(diagonal, vector.flatten(1), atol=1e-12)
        assert float((matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))).abs().max()) > 1e-3


def test_preserve_adds_a_zero_a_channel_and_nothing_else(tmp_path: Path) -> None:
    base = write("hgrn", tmp_path / "base", dtype=torch.bfloat16)
    expand(base, tmp_path / "out", OUTER)
    before, after = tensors(base), tensors(tmp_path / "out")
    gains = [f"model.layers.{index}.mixer.outer_gain" for index in range(2)]
    assert after.keys() - before.keys() == set(gains)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(after[name], torch.zeros(32)) for name in gains)
    assert provenance(tmp_path / "out")["new"] == gains


@torch.no_grad()
def test_the_gain_reads_the_rest_of_the_matrix(tmp_path: Path) -> None:
    """λ is worth having: with the query of the gate it reads foreign channels, at n^-½."""
    base = write("hgrn", tmp_path / "base")
    expand(base, tmp_path / "out", OUTER)
    model = statex.load(tmp_path / "out", dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    mixer = model.model.layers[0].mixer
    mixer.g_norm.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("o", inputs[0]))
    mixer.g_proj.register_forward_hook(lambda module, inputs, output: seen.__setitem__("g", output))
    cache = model(tokens(batch=1), use_cache=True).past_key_values
    state, h = cache.layers[0].recurrent[0], seen["o"][0, -1]
    q = torch.nn.functional.silu(seen["g"][0, -1]).view(4, 8)
    mixer.outer_gain.fill_(0.5)
    model(tokens(batch=1))
    read = 8**-0.5 * torch.einsum("hk,hkv->hv", q, state).flatten()
    assert torch.allclose(seen["o"][0, -1], h + 0.5 * read, atol=1e-10)


@pytest.mark.parametrize("variant", [{}, CONVOLVED, {"use_lower_bound": False, "tie_word_embeddings": True}], ids=str)
def test_inherit_is_a_stock_hgrn2_whose_query_is_the_former_gate(tmp_path: Path, variant: dict[str, Any]) -> None:
    base = write("hgrn", tmp_path / "base", **variant)
    expand(base, tmp_path / "out", {**OUTER, "init": "inherit"})
    export_native(tmp_path / "out", tmp_path / "stock")
    config = config_of(tmp_path / "stock")
    assert (config["model_type"], config["expand_ratio"], config["num_heads"]) == ("hgrn2", 8, 4)
    assert config["architectures"] == ["HGRN2ForCausalLM"]
    assert config["eos_token_id"] == config_of(base)["eos_token_id"]
    before, after = tensors(base), tensors(tmp_path / "stock")
    assert torch.equal(after["model.layers.1.mixer.q_proj.weight"], before["model.layers.1.mixer.g_proj.weight"])
    kept = [name for name in before if "g_proj" not in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    with open_checkpoint(tmp_path / "stock") as stock, open_checkpoint(tmp_path / "out") as out:
        assert stock.family.name == "hgrn2"
        assert stock.description.layers == out.description.layers
    assert largest_difference(tmp_path / "out", tmp_path / "stock") < 1e-12


def test_the_querys_new_convolution_passes_its_input_on(tmp_path: Path) -> None:
    base = write("hgrn", tmp_path / "base", dtype=torch.bfloat16, **CONVOLVED)
    expand(base, tmp_path / "out", {**OUTER, "init": "inherit"})
    after = tensors(tmp_path / "out")
    taps, bias = (after[f"model.layers.0.mixer.q_conv1d.{part}"] for part in ("weight", "bias"))
    assert taps.dtype == bias.dtype == torch.bfloat16
    assert not bool(bias.any())
    assert torch.equal(taps[:, 0], torch.tensor([0.0, 0, 0, 1], dtype=torch.bfloat16).expand(32, 4))


def test_reinit_draws_the_query_and_nothing_else(tmp_path: Path) -> None:
    base = write("hgrn", tmp_path / "base", dtype=torch.bfloat16, **CONVOLVED)
    expand(base, tmp_path / "out", {**OUTER, "init": "reinit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    kept = [name for name in before if "g_proj" not in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    query = after["model.layers.0.mixer.q_proj.weight"]
    assert query.dtype == torch.bfloat16
    assert 0.015 < float(query.float().std()) < 0.025  # fla's initializer_range is 0.02
    assert all("mixer.q_" in name for name in after.keys() - before.keys())


def test_layers_that_the_plan_leaves_out_stay_vectors(tmp_path: Path) -> None:
    base = write("hgrn", tmp_path / "base")
    expand(base, tmp_path / "out", {**OUTER, "layers": [1]})
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert [layer.outer for layer in checkpoint.description.layers] == [None, "added"]
    assert largest_difference(base, tmp_path / "out") < 1e-10
    expand(base, tmp_path / "mixed", {**OUTER, "layers": [1], "init": "inherit"})
    assert bool(logits(tmp_path / "mixed").isfinite().all())


UNEXPORTABLE = {
    "new tensors": ({**OUTER}, "mixer.outer_gain"),
    "some layers only": ({**OUTER, "layers": [0], "init": "inherit"}, "layers differ"),
}


@pytest.mark.parametrize("case", UNEXPORTABLE)
def test_what_no_stock_checkpoint_can_hold_is_not_exported(tmp_path: Path, case: str) -> None:
    plan, complaint = UNEXPORTABLE[case]
    expand(write("hgrn", tmp_path / "base"), tmp_path / "out", plan)
    with pytest.raises(ExportError, match=complaint):
        export_native(tmp_path / "out", tmp_path / "stock")


REFUSED = {
    "no divisor": ("hgrn", {}, [{**OUTER, "factor": 5}], r"heads of 5 channels do not divide its 32 channels.*Use 2 or 4"),
    "no stock width": ("hgrn", {"expand_ratio": 2}, [{**OUTER, "init": "inherit"}], "no expand_ratio for its width.*Use preserve"),
    "a vector has no keys": ("hgrn", {}, [{"operator": "lift_keys", "factor": 2}], "vector, without keys.*Use outer_product first"),
    "another family": ("gla", {}, [OUTER], "outer_product is not defined for the family gla"),
    "no heads to merge": ("hgrn", {}, [{"operator": "merge_heads", "factor": 2}], "merge_heads is not defined for the family hgrn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_outer_product_cannot_do_is_refused_with_layer_and_remedy(tmp_path: Path, case: str) -> None:
    family, variant, plan, complaint = REFUSED[case]
    with pytest.raises(PlanError, match=complaint):
        expand(write(family, tmp_path / "base", **variant), tmp_path / "out", *plan)
    assert not (tmp_path / "out").exists()


def test_a_second_outer_product_is_refused_and_a_lift_on_top_keeps_the_function(tmp_path: Path) -> None:
    base = write("hgrn", tmp_path / "base")
    expand(base, tmp_path / "out", OUTER)
    with pytest.raises(PlanError, match=r"expanded already.*8 × 8 a head already"):
        expand(tmp_path / "out", tmp_path / "twice", OUTER)
    expand(tmp_path / "out", tmp_path / "lifted", {"operator": "lift_keys", "layers": "all", "factor": 3})
    assert largest_difference(base, tmp_path / "lifted") < 1e-10


@pytest.mark.parametrize(("hidden", "width"), [(32, 32), (256, 128), (96, 96), (160, 80)])
def test_the_default_is_heads_of_128_channels_or_the_most_that_divides(tmp_path: Path, hidden: int, width: int) -> None:
    base = write("hgrn", tmp_path / "base", hidden_size=hidden, num_hidden_layers=1)
    summary = expand(base, None, {"operator": "outer_product"}, dry_run=True)
    assert [row.after.key_dim for row in summary.rows] == [width]


def test_hgrn2_merged_by_inherit_keeps_every_tensor_and_is_stock(tmp_path: Path) -> None:
    base = write("hgrn2", tmp_path / "base")
    expand(base, tmp_path / "out", {"operator": "merge_heads", "layers": "all", "factor": 2, "init": "inherit"})
    export_native(tmp_path / "out", tmp_path / "stock")
    before, after = tensors(base), tensors(tmp_path / "stock")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert config_of(tmp_path / "stock") == config_of(base) | {"expand_ratio": 16, "num_heads": 2}
    assert largest_difference(tmp_path / "out", tmp_path / "stock") < 1e-12
