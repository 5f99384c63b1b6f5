"""The delta rule under merge_heads, lift_keys and extend_spectrum: function, gradients, stock checkpoints, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import statex
from statex.checkpoints import export_native, inspect_checkpoint, open_checkpoint
from statex.errors import ExportError, PlanError
from statex.kernels import lift
from tests.surgery.helpers import LIFT, MERGE, expand, largest_difference, provenance, tensors, tokens, write
from tests.surgery.test_gradients import gradients_seen

FP64, FP32 = 1e-10, 2e-5
"""Bounds of tests/surgery/test_preserve.py, for the same reasons."""

EXTEND = {"operator": "extend_spectrum", "layers": "all"}
GROUPED = {"num_heads": 2, "num_v_heads": 6}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "delta_net": ("delta_net", {}),
    "delta_net, gate, no convolution": ("delta_net", {"use_gate": True, "use_short_conv": False}),
    "delta_net, keys that sum to 1, elu, tied": (
        "delta_net",
        {"qk_norm": "sum", "qk_activation": "elu", "conv_bias": True, "tie_word_embeddings": True},
    ),
    "delta_net, no beta": ("delta_net", {"use_beta": False, "qk_activation": "identity", "expand_k": 2.0}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet, grouped values": ("gated_deltanet", GROUPED),
    "gated_deltanet, no gate, convolution with bias": ("gated_deltanet", {"use_gate": False, "conv_bias": True}),
}
PLANS: dict[str, list[dict[str, Any]]] = {
    "merge by 2, channel": [{**MERGE, "factor": 2}],
    "merge by 2, scalar": [{**MERGE, "factor": 2, "mixing": "scalar"}],
    "merge all": [MERGE],
    "lift": [LIFT],
    "extend": [EXTEND],
    "merge (scalar), lift by 3, extend": [EXTEND, {**LIFT, "factor": 3}, {**MERGE, "factor": 2, "mixing": "scalar"}],
}
every_variant = pytest.mark.parametrize(("family", "variant"), VARIANTS.values(), ids=VARIANTS)
every_family = pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])


def description(path: Path, layer: int = 0) -> Any:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.description.layers[layer]


def rewrite(path: Path, ending: str, seed: int = 3) -> None:
    """Add noise to all tensors of that name, as training would."""
    file = next(path.glob("*.safetensors"))
    weights, generator = load_file(file), torch.Generator().manual_seed(seed)
    for name in (name for name in weights if name.endswith(ending)):
        weights[name] = weights[name] + torch.randn(weights[name].shape, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@every_variant
def test_preserve_computes_the_same_function(tmp_path: Path, family: str, variant: dict[str, Any], plan: list[dict]) -> None:
    base = write(family, tmp_path / "base", **variant)
    expand(base, tmp_path / "out", *plan)
    assert largest_difference(base, tmp_path / "out") < FP64
    assert largest_difference(base, tmp_path / "out", torch.float32) < FP32


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@every_variant
def test_every_new_degree_of_freedom_gets_a_gradient_within_two_steps(
    tmp_path: Path, family: str, variant: dict[str, Any], plan: list[dict]
) -> None:
    expand(write(family, tmp_path / "base", **variant), tmp_path / "out", *plan)
    seen, _ = gradients_seen(tmp_path / "out", steps=2)
    new = provenance(tmp_path / "out")["new"]
    assert new
    for name in new:
        assert bool((seen[name] > 0).all()), name


@pytest.mark.parametrize("mixing", ["scalar", "channel"])
@pytest.mark.parametrize(("family", "variant"), [("delta_net", {}), ("gated_deltanet", GROUPED | {"num_heads": 2})])
def test_preserve_gives_every_value_head_a_longer_state_and_keys_of_its_own(
    tmp_path: Path, family: str, variant: dict[str, Any], mixing: str
) -> None:
    base = write(family, tmp_path / "base", **variant)
    expand(base, tmp_path / "out", {**MERGE, "factor": 2, "mixing": mixing})
    source, layer = description(base), description(tmp_path / "out")
    assert layer == source.replace(
        query_heads=source.query_heads // 2, key_heads=source.key_heads // 2, key_dim=16, blocks=2, mixing=mixing
    )
    assert layer.state_elements == 2 * source.state_elements
    before, after = tensors(base), tensors(tmp_path / "out")
    assert set(after) - set(before) == {f"model.layers.{i}.mixer.mixing" for i in range(2)}
    assert all(torch.equal(before[name], after[name]) for name in before)
    values = source.value_heads // source.key_heads
    expected = torch.eye(2).repeat_interleave(1 if mixing == "scalar" else 8, dim=0)[:, :, None]
    assert torch.equal(after["model.layers.0.mixer.mixing"], expected.expand(layer.key_heads, -1, 2, values))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("mixing", ["scalar", "channel"])
@torch.no_grad()
def test_an_open_mixing_writes_under_normalised_mixtures_of_all_keys_and_reads_with_all_queries(
    tmp_path: Path, mixing: str
) -> None:
    """The layer against loops over the formulas of docs/surgery.md, with M, γ and ρ away from where they start."""
    expand(
        write("gated_deltanet", tmp_path / "base", **GROUPED, num_hidden_layers=1, use_short_conv=False, use_gate=False),
        tmp_path / "out", {**MERGE, "mixing": mixing}, LIFT, EXTEND,
    )  # fmt: skip
    for ending in ("mixing", "lift_gamma", "spectrum_rho"):
        rewrite(tmp_path / "out", ending)
    model = statex.load(tmp_path / "out", dtype=torch.float64)
    mixer, x = model.model.layers[0].mixer, torch.randn(1, 20, 32, dtype=torch.float64)
    q, k, v = (F.silu(projection(x))[0] for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k, v = (rows.unflatten(-1, (heads, -1)) for rows, heads in ((q, 2), (k, 2), (v, 6)))
    decay = torch.exp(-mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias))[0]
    beta = (2 * torch.sigmoid(mixer.spectrum_rho) * torch.sigmoid(mixer.b_proj(x)))[0]
    raw, asked = k.flatten(1), unit(q).flatten(1)
    lifted = torch.cat([raw, mixer.lift_gamma[0] * lift(raw, 2)], -1)
    query = torch.cat([asked, lift(asked, 2)], -1) * 8**-0.5
    outputs = torch.zeros(20, 6, 12, dtype=torch.float64)
    for value_head in range(6):
        state = torch.zeros(32, 12, dtype=torch.float64)
        gains = mixer.mixing[0, :, value_head // 3, value_head % 3]
        if mixing == "scalar":
            gains = gains.repeat_interleave(8)
        keys = unit(lifted * gains.repeat(2))
        for t in range(20):
            state = decay[t, value_head] * state
            write_ = beta[t, value_head] * (v[t, value_head] - keys[t] @ state)
            state = state + torch.outer(keys[t], write_)
            outputs[t, value_head] = query[t] @ state
    normed = outputs / (outputs.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.o_norm.weight
    expected = mixer.o_proj(normed.flatten(1))
    from statex.models.components import TokenLayout

    assert torch.allclose(mixer(x, TokenLayout())[0], expected, atol=1e-10)


@every_family
@torch.no_grad()
def test_keys_stay_normalised_however_far_mixing_and_gates_open(tmp_path: Path, family: str) -> None:
    """So a step's eigenvalue 1 - beta·|k|² stays inside [-1, 1]."""
    expand(write(family, tmp_path / "base"), tmp_path / "out", {**MERGE, "factor": 2}, LIFT)
    for ending in ("mixing", "lift_gamma"):
        rewrite(tmp_path / "out", ending)
    mixer = statex.load(tmp_path / "out").model.layers[0].mixer
    keys = mixer._keys(torch.randn(2, 9, mixer.layer.key_heads, mixer.layer.key_dim))
    assert keys.shape == (2, 9, mixer.layer.value_heads, mixer.layer.state_key_dim)
    assert torch.allclose(keys.norm(dim=-1), torch.ones(2, 9, mixer.layer.value_heads), atol=1e-5)


@pytest.mark.parametrize("mixing", ["scalar", "channel"])
@pytest.mark.parametrize(("family", "variant"), [("delta_net", {}), ("gated_deltanet", {"num_v_heads": 8})])
def test_merging_twice_equals_merging_once(tmp_path: Path, family: str, variant: dict[str, Any], mixing: str) -> None:
    base = write(family, tmp_path / "base", **variant)
    expand(base, tmp_path / "half", {**MERGE, "factor": 2, "mixing": mixing})
    expand(tmp_path / "half", tmp_path / "whole", {**MERGE, "factor": 2, "mixing": mixing})
    expand(base, tmp_path / "at once", {**MERGE, "factor": 4, "mixing": mixing})
    once, twice = tensors(tmp_path / "at once"), tensors(tmp_path / "whole")
    assert description(tmp_path / "whole") == description(tmp_path / "at once")
    assert all(torch.equal(once[name], twice[name]) for name in once.keys() | twice.keys())


@every_family
def test_merging_a_trained_mixing_keeps_the_function(tmp_path: Path, family: str) -> None:
    expand(write(family, tmp_path / "base"), tmp_path / "half", {**MERGE, "factor": 2, "mixing": "scalar"})
    rewrite(tmp_path / "half", "mixing")
    for mixing in ("scalar", "channel"):
        expand(tmp_path / "half", tmp_path / mixing, {**MERGE, "factor": 2, "mixing": mixing})
        assert largest_difference(tmp_path / "half", tmp_path / mixing) < FP64


def stock(base: Path, out: Path, changes: dict[str, Any], change_tensors: dict[str, Any]) -> Path:
    """The base with config keys changed, and tensors by the end of their names."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
    weights = load_file(base / "model.safetensors")
    for ending, change in change_tensors.items():
        weights |= {name: change(tensor) for name, tensor in weights.items() if name.endswith(ending)}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_inherit_of_delta_net_is_the_stock_model_with_fewer_heads_and_averaged_betas(tmp_path: Path) -> None:
    base = write("delta_net", tmp_path / "base")
    expand(base, tmp_path / "out", {**MERGE, "factor": 2, "init": "inherit"})
    average = {"b_proj.weight": lambda rows: (rows[0::2] + rows[1::2]) / 2, "o_norm.weight": lambda weight: weight.repeat(2)}
    expected = stock(base, tmp_path / "stock", {"num_heads": 2}, average)
    assert description(tmp_path / "out") == description(expected)
    assert largest_difference(tmp_path / "out", expected) < 1e-12
    assert export_native(tmp_path / "out", tmp_path / "native") == []
    assert json.loads((tmp_path / "native" / "config.json").read_text())["num_heads"] == 2


@pytest.mark.parametrize("variant", [{}, {"num_v_heads": 8}], ids=["as many", "grouped values"])
def test_inherit_of_gated_deltanet_changes_no_tensor_and_is_the_stock_model_with_grouped_values(
    tmp_path: Path, variant: dict[str, Any]
) -> None:
    base = write("gated_deltanet", tmp_path / "base", **variant)
    expand(base, tmp_path / "out", {**MERGE, "factor": 2, "init": "inherit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert description(tmp_path / "out").state_elements == 2 * description(base).state_elements
    changes = {"num_heads": 2, "head_dim": 16, "num_v_heads": variant.get("num_v_heads", 4), "expand_v": 0.75}
    expected = stock(base, tmp_path / "stock", changes, {})
    assert largest_difference(tmp_path / "out", expected) < 1e-12
    export_native(tmp_path / "out", tmp_path / "native")
    assert json.loads((tmp_path / "native" / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


@every_family
def test_reinit_draws_the_mixer_and_its_norm_and_nothing_else_and_exports(tmp_path: Path, family: str) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "out", {**MERGE, "factor": 2, "init": "reinit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in after if after[name].shape != before[name].shape or not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if ".mixer" in name} == set(provenance(tmp_path / "out")["expanded"])
    assert description(tmp_path / "out").state_elements == 2 * description(base).state_elements
    export_native(tmp_path / "out", tmp_path / "native")
    assert largest_difference(tmp_path / "out", tmp_path / "native") < 1e-12


@every_family
def test_negative_eigenvalues_export_as_the_familys_switch(tmp_path: Path, family: str) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "out", {**EXTEND, "init": "inherit"})
    export_native(tmp_path / "out", tmp_path / "native")
    source = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "native" / "config.json").read_text()) == source | {"allow_neg_eigval": True}
    assert largest_difference(tmp_path / "out", tmp_path / "native") < 1e-12
    assert largest_difference(tmp_path / "out", base) > 1e-3
    with pytest.raises(PlanError, match="extended already"):
        expand(tmp_path / "native", tmp_path / "again", EXTEND)


@every_family
@pytest.mark.parametrize(
    ("operation", "words"), [({**MERGE, "factor": 2}, "mixer.mixing"), (LIFT, "mixer.lift_gamma"), (EXTEND, "spectrum_rho")]
)
def test_what_no_stock_checkpoint_holds_is_refused_by_tensor(tmp_path: Path, family: str, operation: dict, words: str) -> None:
    expand(write(family, tmp_path / "base"), tmp_path / "out", {**operation, "layers": [1]})
    with pytest.raises(ExportError, match=words):
        export_native(tmp_path / "out", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_the_limit_of_flas_kernels_is_named(tmp_path: Path) -> None:
    base = write("gated_deltanet", tmp_path / "base", head_dim=160, expand_v=0.05, num_hidden_layers=1)
    assert export_native(base, tmp_path / "short") == []
    expand(base, tmp_path / "out", {**MERGE, "factor": 2, "init": "inherit"})
    assert any("256" in note and "320" in note for note in export_native(tmp_path / "out", tmp_path / "long"))


@every_family
def test_a_learned_spectrum_survives_a_merge(tmp_path: Path, family: str) -> None:
    expand(write(family, tmp_path / "base"), tmp_path / "learned", EXTEND)
    rewrite(tmp_path / "learned", "spectrum_rho")
    expand(tmp_path / "learned", tmp_path / "out", {**MERGE, "factor": 2})
    assert largest_difference(tmp_path / "learned", tmp_path / "out") < FP64
    with pytest.raises(PlanError, match="cannot keep each head's learned spectrum"):
        expand(tmp_path / "learned", tmp_path / "inherited", {**MERGE, "factor": 2, "init": "inherit"})


@pytest.mark.parametrize(("init", "value"), [("preserve", 0.0), ("inherit", 1.0), ("reinit", 1.0)])
@every_family
def test_lifting_gates_the_keys(tmp_path: Path, family: str, init: str, value: float) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "out", {**LIFT, "init": init})
    before, after = tensors(base), tensors(tmp_path / "out")
    assert torch.equal(after["model.layers.0.mixer.lift_gamma"], torch.full((4, 8), value))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    redrawn = {f"model.layers.{i}.mixer.{part}_{kind}.weight" for i in (0, 1) for part in "qk" for kind in ("proj", "conv1d")}
    assert changed == (redrawn if init == "reinit" else set())


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (None, {**MERGE, "factor": 3}, "factor 3 does not divide its 4"),
        (MERGE, MERGE, "nothing to merge"),
        (LIFT, {**MERGE, "factor": 2}, "keys are lifted"),
        ({**MERGE, "factor": 2}, {**MERGE, "factor": 2, "init": "inherit"}, "cannot keep this layer's mixing"),
        ({**MERGE, "factor": 2}, {**MERGE, "factor": 2, "mixing": "scalar"}, "per channel already"),
        (None, {**LIFT, "factor": 5}, "too few different products"),
        (EXTEND, EXTEND, "extended already"),
        (None, {"operator": "widen_state", "layers": "all", "factor": 2}, "not defined for the family"),
    ],
)
@every_family
def test_what_is_not_defined_is_refused_with_remedy(
    tmp_path: Path, family: str, first: dict | None, second: dict, words: str
) -> None:
    base = write(family, tmp_path / "base")
    if first is not None:
        expand(base, tmp_path / "first", first)
        base = tmp_path / "first"
    with pytest.raises(PlanError, match=words) as caught:
        expand(base, tmp_path / "out", second)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


@every_family
def test_state_accounting_equals_the_cache(tmp_path: Path, family: str) -> None:
    base = write(family, tmp_path / "base")
    summary = expand(base, tmp_path / "out", {**MERGE, "layers": [1], "factor": 2}, LIFT)
    for path, cost in ((base, summary.before), (tmp_path / "out", summary.after)):
        cache = statex.load(path)(tokens(batch=1), use_cache=True).past_key_values
        held = [state for layer in cache.layers for state in (layer.recurrent, *layer.conv.values())]
        found = inspect_checkpoint(path)
        assert cache.nbytes == cost.state_bytes == found.state_bytes
        assert sum(state.numel() for state in held) == cost.state_elements == found.state_elements
        assert {note.name: note.applicable for note in found.operators}["extend_spectrum"]


def test_the_default_plan_lifts_all_layers(tmp_path: Path) -> None:
    summary = expand(write("delta_net", tmp_path / "base", expand_k=2.0), tmp_path / "out", {}, dry_run=True)
    assert [(row.operator, row.factor, row.init) for row in summary.rows] == [("lift_keys", 4, "preserve")] * 2
