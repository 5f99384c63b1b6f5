"""lift_keys: what each init does, lifting a lifted layer, and where it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from statex.checkpoints import open_checkpoint
from statex.errors import PlanError
from statex.kernels import lift
from tests.surgery.helpers import LIFT, MERGE, WIDEN, expand, largest_difference, tensors, write

GAMMA = "model.layers.0.mixer.lift_gamma"


@pytest.mark.parametrize(("init", "value"), [("preserve", 0.0), ("inherit", 1.0)])
@pytest.mark.parametrize(("family", "shape"), [("gla", (4, 4)), ("mamba2", (2, 8))])
def test_gates_start_at_the_value_of_the_init(tmp_path: Path, family: str, shape: tuple[int, int], init: str, value: float) -> None:
    """One gate per query head (Mamba-2: per group) and new key channel, in fp32."""
    variant = {} if family == "gla" else {"n_groups": 2}
    base = write(family, tmp_path / "base", **variant)
    expand(base, tmp_path / "out", {**LIFT, "init": init})
    before, after = tensors(base), tensors(tmp_path / "out")
    assert torch.equal(after[GAMMA], torch.full(shape, value))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_grouped_queries_have_gates_of_their_own(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", num_kv_heads=2)
    expand(base, tmp_path / "out", LIFT)
    assert tensors(tmp_path / "out")[GAMMA].shape == (4, 4)


def test_reinit_draws_keys_and_queries_of_gla_and_nothing_else(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base", use_short_conv=True)
    expand(base, tmp_path / "out", {**LIFT, "layers": [0], "init": "reinit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.mixer.{part}.weight" for part in ("q_proj", "k_proj", "q_conv1d", "k_conv1d")}
    assert torch.equal(after[GAMMA], torch.ones(4, 4))


def test_reinit_draws_b_and_c_of_mamba2_and_nothing_else(tmp_path: Path) -> None:
    base = write("mamba2", tmp_path / "base", n_groups=2)
    expand(base, tmp_path / "out", {**LIFT, "layers": [0], "init": "reinit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    first_rows = {"in_proj.weight": 128, "conv1d.weight": 64, "conv1d.bias": 64}
    starts = {f"model.layers.0.mixer.{name}": row for name, row in first_rows.items()}
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(starts)
    for name, start in starts.items():
        rows = (before[name] != after[name]).flatten(1).any(dim=1) if before[name].dim() > 1 else before[name] != after[name]
        assert rows.nonzero().flatten().tolist() == list(range(start, start + 32)), name


def test_lifting_a_lifted_layer_keeps_its_gates_and_its_function(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write("mamba2", tmp_path / "base", state_size=16)
    expand(base, tmp_path / "two", LIFT)
    file = next((tmp_path / "two").glob("*.safetensors"))
    weights = load_file(file)
    weights[GAMMA] = torch.randn_like(weights[GAMMA])
    save_file(weights, file, metadata={"format": "pt"})
    expand(tmp_path / "two", tmp_path / "four", LIFT)
    with open_checkpoint(tmp_path / "four") as checkpoint:
        assert checkpoint.description.layers[0].lift == 4
    gamma = tensors(tmp_path / "four")[GAMMA]
    assert torch.equal(gamma[:, :16], weights[GAMMA])
    assert not bool(gamma[:, 16:].any())
    assert largest_difference(tmp_path / "two", tmp_path / "four") < 1e-10


@pytest.mark.parametrize("key_dim", [4, 5, 8])
def test_the_largest_lift_has_no_product_twice_and_one_more_has(key_dim: int) -> None:
    """ψ as monomials: the pair of channels that each new channel multiplies."""

    def pairs(factor: int) -> list[frozenset[int]]:
        return [frozenset((i, (i - r) % key_dim)) for r in range(1, factor) for i in range(key_dim)]

    largest = (key_dim - 1) // 2 + 1
    assert len(set(pairs(largest))) == len(pairs(largest))
    assert len(set(pairs(largest + 1))) < len(pairs(largest + 1))


def test_the_kernels_products_are_those_pairs() -> None:
    x = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0])
    scaled = lift(x, 2) * (x.square().mean() + 1e-4).sqrt()
    assert torch.allclose(scaled, x * torch.tensor([11.0, 2.0, 3.0, 5.0, 7.0]))


def test_a_lift_that_would_repeat_products_is_refused(tmp_path: Path) -> None:
    base = write("gla", tmp_path / "base")
    with pytest.raises(PlanError, match="too few different products for a lift of ×4 in all"):
        expand(base, tmp_path / "out", {**LIFT, "factor": 4})
    expand(base, tmp_path / "out", {**MERGE, "factor": 4}, {**LIFT, "factor": 4})


def test_the_default_factor_never_repeats_products(tmp_path: Path) -> None:
    summary = expand(write("gla", tmp_path / "base"), tmp_path / "out", {"operator": "lift_keys"}, dry_run=True)
    assert [row.after.lift for row in summary.rows] == [2, 2]
    wide = write("mamba2", tmp_path / "wide", state_size=16)
    summary = expand(wide, tmp_path / "out", {"operator": "lift_keys"}, dry_run=True)
    assert [row.after.lift for row in summary.rows] == [4, 4]


@pytest.mark.parametrize("init", ["preserve", "inherit", "reinit"])
@pytest.mark.parametrize(("family", "growth"), [("gla", MERGE), ("mamba2", {**WIDEN, "factor": 2})])
def test_the_order_in_the_plan_does_not_matter(tmp_path: Path, family: str, growth: dict, init: str) -> None:
    """lift_keys runs after merge_heads and widen_state wherever it stands."""
    base = write(family, tmp_path / "base")
    lifting = {**LIFT, "init": init}
    expand(base, tmp_path / "a", growth, lifting)
    expand(base, tmp_path / "b", lifting, growth)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


OUTER = {"operator": "outer_product", "layers": "all", "factor": 8}
REDRAWN: dict[str, tuple[str, list[dict[str, Any]], set[str]]] = {
    "hgrn2": ("hgrn2", [], {"q_proj", "q_conv1d", "f_proj", "f_conv1d"}),
    "hgrn, the gate its query": ("hgrn", [OUTER], {"g_proj", "f_proj", "f_conv1d"}),
    "hgrn, a query of its own": ("hgrn", [{**OUTER, "init": "inherit"}], {"q_proj", "q_conv1d", "f_proj", "f_conv1d"}),
    "mamba": ("mamba", [], {"x_proj"}),
}


@pytest.mark.parametrize("case", REDRAWN)
def test_reinit_draws_what_makes_keys_and_queries_and_nothing_else(tmp_path: Path, case: str) -> None:
    family, first, expected = REDRAWN[case]
    base = write(family, tmp_path / "base", **({} if family == "mamba" else {"use_short_conv": True}))
    if first:
        expand(base, tmp_path / "first", *first)
        base = tmp_path / "first"
    expand(base, tmp_path / "out", {**LIFT, "init": "reinit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[4] for name in changed} == expected
    if family == "mamba":  # [dt, B, C]
        name = "model.layers.0.mixer.x_proj.weight"
        assert torch.equal(after[name][:3], before[name][:3])
        assert bool((after[name][3:] != before[name][3:]).any(1).all())
