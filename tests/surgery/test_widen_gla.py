"""widen_state on GLA: where new rows go, what they hold, that they live, and which results are stock checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import statex
from statex.checkpoints import export_native, inspect_checkpoint, open_checkpoint
from statex.errors import ExportError, PlanError
from statex.families.gla import FEATURE_MAPS
from statex.surgery.operators import widen_state
from tests.models.test_equals_fla import TOLERANCE, fla_model, naive_recurrent_gla
from tests.surgery.helpers import LIFT, MERGE, WIDEN, expand, largest_difference, logits, provenance, tensors, tokens, write
from tests.surgery.test_gradients import gradients_seen

__all__ = ["naive_recurrent_gla"]  # a fixture

SHARED = {"num_kv_heads": 2, "use_short_conv": True, "conv_bias": True}
"""4 query heads on 2 key heads, channels of 4, taps and biases on both."""
MIXER = "model.layers.0.mixer."
SIDES = {"q_proj.weight": 4, "q_conv1d.weight": 4, "q_conv1d.bias": 4, "k_proj.weight": 2, "k_conv1d.weight": 2, "k_conv1d.bias": 2}
DECAYS = {"gk_proj.1.weight": 2, "gk_proj.1.bias": 2}
"""Tensors that grow and the heads of each, in a checkpoint of `SHARED`."""
GROWN = SIDES | DECAYS

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared keys": {"num_kv_heads": 2},
    "convolutions": {"use_short_conv": True},
    "shared keys, convolutions with bias": SHARED,
    "silu": {"feature_map": "silu"},
    "swish behind convolutions": {"feature_map": "swish", "use_short_conv": True, "num_kv_heads": 1},
    "clamped decay, no gate, no norm weight, tied": {
        "clamp_min": -0.1, "use_output_gate": False, "elementwise_affine": False, "tie_word_embeddings": True,
    },
}  # fmt: skip


def by_head(path: Path, name: str) -> Tensor:
    """A tensor of layer 0 as `[heads, channels, ...]`."""
    return tensors(path)[MIXER + name].unflatten(0, (GROWN[name], -1))


@pytest.mark.parametrize("zero", ["B", "C"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_gla_with_longer_keys_computes_the_same_function(tmp_path: Path, variant: dict[str, Any], zero: str) -> None:
    base = write("gla", tmp_path / "base", **variant)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 3, "zero": zero})
    assert largest_difference(base, tmp_path / "out") < 1e-10


def test_half_precision_checkpoints_keep_their_dtype_and_function(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        base = write("gla", tmp_path / f"{dtype}", dtype=dtype, **SHARED)
        expand(base, tmp_path / f"{dtype} wide", {**WIDEN, "factor": 4})
        assert {tensor.dtype for tensor in tensors(tmp_path / f"{dtype} wide").values()} == {dtype}
        assert largest_difference(base, tmp_path / f"{dtype} wide") < 1e-10


@pytest.mark.parametrize("init", ["preserve", "inherit"])
def test_old_rows_of_every_head_stay_and_new_ones_go_behind_them(tmp_path: Path, init: str) -> None:
    base = write("gla", tmp_path / "base", **SHARED)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 3, "init": init})
    for name in GROWN:
        assert torch.equal(by_head(tmp_path / "out", name)[:, :4], by_head(base, name)), name


@pytest.mark.parametrize(("zero", "silent", "drawn"), [("C", "q", "k"), ("B", "k", "q")])
def test_preserve_silences_one_side_of_gla_draws_the_other_and_repeats_decays_and_taps(
    tmp_path: Path, zero: str, silent: str, drawn: str
) -> None:
    base = write("gla", tmp_path / "base", **SHARED)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 9, "zero": zero})
    before, after = ({name: by_head(path, name) for name in GROWN} for path in (base, tmp_path / "out"))
    assert not bool(after[f"{silent}_proj.weight"][:, 4:].any())
    assert not bool(after[f"{silent}_conv1d.bias"][:, 4:].any())
    for old, new in zip(before[f"{drawn}_proj.weight"], after[f"{drawn}_proj.weight"], strict=True):
        assert float(new[4:].std()) == pytest.approx(float(old.std()), rel=0.1)
    for name in (f"{drawn}_conv1d.bias", "q_conv1d.weight", "k_conv1d.weight", *DECAYS):
        assert torch.equal(after[name], torch.cat([before[name]] * 9, dim=1)), name


@pytest.mark.parametrize("init", ["preserve", "inherit", "reinit"])
def test_keys_queries_and_decays_grow_and_all_else_stays(tmp_path: Path, init: str) -> None:
    base = write("gla", tmp_path / "base", **SHARED)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "layers": [0], "init": init})
    before, after, told = tensors(base), tensors(tmp_path / "out"), provenance(tmp_path / "out")
    grown = {MIXER + name for name in GROWN}
    assert {name for name in after if after[name].shape != before[name].shape} == grown == set(told["expanded"])
    assert told["new"] == []
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - grown)


@pytest.mark.parametrize("zero", ["B", "C"])
@pytest.mark.parametrize("variant", [{}, SHARED, {"feature_map": "silu"}], ids=["plain", "convolutions with bias", "silu"])
def test_every_new_row_of_gla_lives_within_two_steps_and_none_is_anothers_copy(
    tmp_path: Path, variant: dict[str, Any], zero: str
) -> None:
    base = write("gla", tmp_path / "base", num_hidden_layers=1, **variant)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "zero": zero})
    first, _ = gradients_seen(tmp_path / "out", steps=1)
    seen, after = gradients_seen(tmp_path / "out", steps=2)
    grown = provenance(tmp_path / "out")["expanded"]
    assert len(grown) == (8 if variant == SHARED else 4)
    assert bool((first[MIXER + ("q" if zero == "C" else "k") + "_proj.weight"] > 0).all())
    for name in grown:
        assert bool((seen[name] > 0).all()), name
    for side in "qk":
        rows = after[f"{MIXER}{side}_proj.weight"]
        assert float(torch.cdist(rows, rows).add(torch.eye(len(rows))).min()) > 1e-4
        assert torch.linalg.matrix_rank(rows) == len(rows)


@pytest.mark.parametrize("feature_map", ["relu", "sigmoid"])
@pytest.mark.parametrize("zero", ["B", "C"])
def test_feature_maps_that_have_no_start_at_zero_are_refused(
    tmp_path: Path, feature_map: str, zero: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And why: zeros behind a relu get no gradient, ever, and zeros behind a sigmoid are read."""
    base, operation = write("gla", tmp_path / "base", feature_map=feature_map, num_hidden_layers=1), {**WIDEN, "factor": 2}
    with pytest.raises(PlanError, match=f"through a {feature_map}, which .* inherit or reinit"):
        expand(base, tmp_path / "out", {**operation, "zero": zero})
    for init in ("inherit", "reinit"):
        expand(base, tmp_path / init, {**operation, "init": init})
    note = next(note for note in inspect_checkpoint(base).operators if note.name == "widen_state")
    assert note.applicable
    assert "inherit or reinit alone" in note.reason
    monkeypatch.setattr(widen_state, "NO_START_AT_ZERO", {})
    expand(base, tmp_path / "out", {**operation, "zero": zero})
    if feature_map == "sigmoid":
        assert largest_difference(base, tmp_path / "out") > 1e-3
    else:
        seen, _ = gradients_seen(tmp_path / "out", steps=3)
        name = MIXER + ("k" if zero == "B" else "q") + "_proj.weight"
        assert not bool(seen[name].unflatten(0, (4, 8))[:, 4:].any())


def test_every_feature_map_is_widened_or_refused() -> None:
    """The variants above and the refusals name all that a checkpoint can have."""
    kept = {variant.get("feature_map") for variant in VARIANTS.values()}
    assert kept | widen_state.NO_START_AT_ZERO.keys() == set(FEATURE_MAPS)
    assert not kept & widen_state.NO_START_AT_ZERO.keys()


def test_inherit_repeats_rows_and_differs_by_the_output_norms_epsilon_alone(tmp_path: Path) -> None:
    """f equal readings at f^-½ of the scale are √f times the source's, whose norm then sees an epsilon f times smaller."""
    base = write("gla", tmp_path / "base", **SHARED)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 4, "init": "inherit"})
    for name in GROWN:
        assert torch.equal(by_head(tmp_path / "out", name), torch.cat([by_head(base, name)] * 4, dim=1)), name
    assert largest_difference(base, tmp_path / "out") > 1e-3
    source = statex.load(base, dtype=torch.float64)
    for layer in source.model.layers:
        layer.mixer.g_norm.eps /= 4
    with torch.no_grad():
        changed = source(tokens()).logits
    assert float((changed - logits(tmp_path / "out")).abs().max()) < 1e-10


def test_reinit_draws_keys_and_queries_of_gla_and_repeats_decays(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", **SHARED)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 8, "init": "reinit"})
    for name in ("q_proj.weight", "k_proj.weight"):
        drawn = tensors(tmp_path / "out")[MIXER + name]
        bound = 2**-2.5 * (6 / sum(drawn.shape)) ** 0.5
        assert bound * 0.98 < float(drawn.abs().max()) <= bound
    for side in "qk":
        assert 0.45 < float(by_head(tmp_path / "out", f"{side}_conv1d.weight").abs().max()) <= 0.5
        assert not bool(by_head(tmp_path / "out", f"{side}_conv1d.bias").any())
    for name in DECAYS:
        assert torch.equal(by_head(tmp_path / "out", name), torch.cat([by_head(base, name)] * 8, dim=1)), name


@pytest.mark.parametrize(
    ("init", "variant"),
    [
        ("preserve", {"num_kv_heads": 2}),
        ("inherit", {"num_kv_heads": 2, "use_short_conv": True}),
        ("reinit", {"use_short_conv": True}),
        ("reinit", {"feature_map": "relu"}),
    ],
)
@torch.no_grad()
def test_a_widened_gla_is_a_stock_gla_with_a_larger_expand_k(
    tmp_path: Path, init: str, variant: dict[str, Any], naive_recurrent_gla: Any
) -> None:
    """Its logits are those of a model around fla's naive recurrence with fla's own scale, and of the source after `preserve`."""
    base = write("gla", tmp_path / "base", **variant)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 4, "init": init})
    export_native(tmp_path / "out", tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"expand_k": 2.0}
    assert largest_difference(tmp_path / "out", tmp_path / "stock") < 1e-10
    theirs = fla_model(tokens(), tensors(tmp_path / "stock"), config, naive_recurrent_gla)
    expected = logits(base if init == "preserve" else tmp_path / "out", torch.float32)
    assert float((theirs - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


def test_the_sources_scale_goes_into_the_queries_of_a_stock_checkpoint_without_rounding(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", dtype=torch.bfloat16)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 16})
    export_native(tmp_path / "out", tmp_path / "stock")
    before, after = tensors(tmp_path / "out"), tensors(tmp_path / "stock")
    factors = {name: 4 if name.endswith("q_proj.weight") else 1 for name in before}
    assert all(torch.equal(after[name], factors[name] * before[name]) for name in before)
    assert after.keys() == before.keys()
    assert largest_difference(base, tmp_path / "stock") < 1e-10


@pytest.mark.parametrize(
    ("variant", "factor"),
    [({"use_short_conv": True}, 4), ({"feature_map": "silu"}, 4), ({}, 2)],
    ids=["convolutions", "feature map", "a root that rounds"],
)
def test_a_scale_that_no_query_row_can_hold_is_not_exported(tmp_path: Path, variant: dict[str, Any], factor: int) -> None:
    expand(write("gla", tmp_path / "base", **variant), tmp_path / "out", {**WIDEN, "factor": factor})
    with pytest.raises(ExportError, match=r"scale = 0\.5, while a stock gla layer of 4 heads with keys of .* --to hf"):
        export_native(tmp_path / "out", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize("mixing", ["scalar", "channel"])
def test_a_plan_merges_before_it_widens_and_new_rows_go_behind_those_of_their_source_head(tmp_path: Path, mixing: str) -> None:
    merge, widen = {**MERGE, "factor": 2, "mixing": mixing}, {**WIDEN, "factor": 3}
    base = write("gla", tmp_path / "base", **SHARED)
    expand(base, tmp_path / "a", merge, widen)
    expand(base, tmp_path / "b", widen, merge)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    old = tensors(base)[f"{MIXER}k_proj.weight"].unflatten(0, (2, 4))
    assert torch.equal(first[f"{MIXER}k_proj.weight"].unflatten(0, (2, 12))[:, :4], old)
    identity = torch.eye(2).repeat_interleave(12 if mixing == "channel" else 1, dim=0)[None]
    assert torch.equal(first[f"{MIXER}mixing"], identity)
    assert provenance(tmp_path / "a")["new"] == [f"model.layers.{i}.mixer.mixing" for i in range(2)]
    assert largest_difference(base, tmp_path / "a") < 1e-10


@pytest.mark.parametrize("mixing", ["scalar", "channel"])
def test_a_trained_merge_and_a_trained_spectrum_can_be_widened_and_then_merged_again(tmp_path: Path, mixing: str) -> None:
    base, merge = write("gla", tmp_path / "base", use_short_conv=True), {**MERGE, "factor": 2, "mixing": mixing}
    expand(base, tmp_path / "trained", merge, {"operator": "extend_spectrum", "layers": "all"})
    file = next((tmp_path / "trained").glob("*.safetensors"))
    weights = load_file(file)
    for name in provenance(tmp_path / "trained")["new"]:
        weights[name] += torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(3))
    save_file(weights, file, metadata={"format": "pt"})
    expand(tmp_path / "trained", tmp_path / "wide", {**WIDEN, "factor": 3})
    assert largest_difference(tmp_path / "trained", tmp_path / "wide") < 1e-10
    expand(tmp_path / "wide", tmp_path / "whole", {**merge, "mixing": "channel"}, LIFT)
    assert largest_difference(tmp_path / "trained", tmp_path / "whole") < 1e-10


def test_widening_gla_twice_draws_other_rows_and_keeps_the_scale(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", num_hidden_layers=1)
    expand(base, tmp_path / "twice", {**WIDEN, "factor": 2})
    expand(tmp_path / "twice", tmp_path / "four times", {**WIDEN, "factor": 2})
    assert largest_difference(base, tmp_path / "four times") < 1e-10
    with open_checkpoint(tmp_path / "four times") as checkpoint:
        layer = checkpoint.description.layers[0]
    assert (layer.key_dim, layer.scale) == (16, 4**-0.5)
    rows = tensors(tmp_path / "four times")[f"{MIXER}k_proj.weight"].unflatten(0, (4, 16))
    likeness = torch.nn.functional.cosine_similarity(rows[:, :, None], rows[:, None], dim=-1)
    assert float((likeness - torch.eye(16)).abs().max()) < 0.99


def test_new_parameters_of_gla_are_those_of_the_formula(tmp_path: Path) -> None:
    """(f-1)·K·((H + H_kv)·(d + taps + 1 with biases) + H_kv·(rank + 1)) a layer, with H query heads and H_kv key heads."""
    base = write("gla", tmp_path / "base", num_hidden_layers=1, **SHARED)
    rank = tensors(base)[f"{MIXER}gk_proj.0.weight"].shape[0]
    summary = expand(base, tmp_path / "out", {**WIDEN, "factor": 4}, dry_run=True)
    assert summary.new_parameters == 3 * 4 * ((4 + 2) * (32 + 4 + 1) + 2 * (rank + 1))
    assert summary.after.state_elements - summary.before.state_elements == 3 * 4 * (2 * 8 + (4 + 2) * 3)


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ({"factor": 1}, "factor 1 does not enlarge"),
        ({"factor": 2, "new_decays": "continue"}, "`new_decays` of widen_state is for the family mamba, not for gla"),
        (
            {"factor": 2, "init": "reinit", "reinit_decay": True},
            "`reinit_decay` of widen_state is for the family mamba2, not for gla",
        ),
    ],
)
def test_what_gla_has_not_is_refused(tmp_path: Path, operation: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        expand(write("gla", tmp_path / "base"), tmp_path / "out", {**WIDEN, **operation})
    expand(write("gla", tmp_path / "other"), tmp_path / "lifted", LIFT)
    with pytest.raises(PlanError, match="keys are lifted"):
        expand(tmp_path / "lifted", tmp_path / "out", {**WIDEN, "factor": 2})
