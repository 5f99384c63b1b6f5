"""Who learns how fast, who decays, and when a run is stopped."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from statex.checkpoints import open_checkpoint
from statex.errors import RecipeError
from statex.models import StatexForCausalLM, load
from statex.recipes.guard import LossGuard
from statex.recipes.optimizer import build_optimizer, freeze, learning_rate, set_learning_rate, training_roles, undecayed_names
from statex.recipes.schema import Multipliers, Optimizer, Schedule, SpikeGuard
from statex.surgery.new_rows import new_rows
from tests.surgery.helpers import LIFT, MERGE, WIDEN, expand, write

from .helpers import write_byte_gla, write_byte_mamba2, write_lifted

OPTIONS = Optimizer(learning_rate=1e-3, weight_decay=0.1, multipliers=Multipliers(new=10, expanded=3, rest=1))


def prepared(path: Path, options: Optimizer, dtype: torch.dtype = torch.float32) -> tuple[StatexForCausalLM, torch.optim.Optimizer]:
    model = load(path, dtype=dtype)
    with open_checkpoint(path) as checkpoint:
        roles = training_roles([name for name, _ in model.named_parameters()], checkpoint.provenance)
        freeze(model, roles, options)
        rows = new_rows(checkpoint.description, checkpoint.provenance)
        return model, build_optimizer(model, roles, undecayed_names(checkpoint.description), options, rows)


def groups_by_name(path: Path, options: Optimizer) -> tuple[torch.optim.Optimizer, dict[str, dict]]:
    _, optimizer = prepared(path, options)
    return optimizer, {name: group for group in optimizer.param_groups for name in group["param_names"]}


def test_roles_of_an_expanded_checkpoint_get_their_multipliers(tmp_path: Path) -> None:
    optimizer, groups = groups_by_name(write_lifted(tmp_path / "lifted", write_byte_gla(tmp_path / "base")), OPTIONS)
    set_learning_rate(optimizer, 0.5)
    assert groups["model.layers.0.mixer.lift_gamma"]["lr"] == 5.0
    assert groups["model.layers.1.mixer.q_proj.weight"]["lr"] == 1.5
    others = [group["lr"] for name, group in groups.items() if not name.endswith(("lift_gamma", "1.mixer.q_proj.weight"))]
    assert set(others) == {0.5}
    assert len(others) > 20


def test_every_parameter_is_in_exactly_one_group(tmp_path: Path) -> None:
    path = write_lifted(tmp_path / "lifted", write_byte_gla(tmp_path / "base"))
    optimizer, groups = groups_by_name(path, OPTIONS)
    names = [name for name, _ in load(path).named_parameters()]
    assert sorted(groups) == sorted(names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_gla_never_decays_gates_norms_biases_and_lift(tmp_path: Path) -> None:
    base = write_byte_gla(tmp_path / "base", use_short_conv=True, conv_bias=True)
    _, groups = groups_by_name(write_lifted(tmp_path / "lifted", base), OPTIONS)
    undecayed = {
        name.rpartition("layers.0.")[2] for name, group in groups.items() if group["weight_decay"] == 0 and "layers.1" not in name
    }
    assert undecayed == {
        "mixer_norm.weight",
        "mixer.gk_proj.0.weight",
        "mixer.gk_proj.1.weight",
        "mixer.gk_proj.1.bias",
        "mixer.g_norm.weight",
        "mixer.lift_gamma",
        "mixer.q_conv1d.bias",
        "mixer.k_conv1d.bias",
        "mixer.v_conv1d.bias",
        "mlp_norm.weight",
        "model.norm.weight",
    }


def test_mamba2_never_decays_its_dynamics_norms_and_biases(tmp_path: Path) -> None:
    _, groups = groups_by_name(write_byte_mamba2(tmp_path / "base"), OPTIONS)
    undecayed = {
        name.rpartition("layers.0.")[2] for name, group in groups.items() if group["weight_decay"] == 0 and "layers.1" not in name
    }
    expected = {f"mixer.{name}" for name in ("A_log", "dt_bias", "D", "norm.weight", "conv1d.bias")}
    assert undecayed == expected | {"mixer_norm.weight", "model.norm.weight"}
    assert groups["model.layers.0.mixer.in_proj.weight"]["weight_decay"] == 0.1


def test_a_checkpoint_without_surgery_has_one_rate(tmp_path: Path) -> None:
    optimizer, _ = groups_by_name(write_byte_gla(tmp_path / "base"), OPTIONS)
    assert {group["role"] for group in optimizer.param_groups} == {"rest"}


def test_a_multiplier_of_zero_freezes(tmp_path: Path) -> None:
    options = Optimizer(learning_rate=1e-3, multipliers=Multipliers(new=1, expanded=0, rest=0))
    path = write_lifted(tmp_path / "lifted", write_byte_gla(tmp_path / "base"))
    _, groups = groups_by_name(path, options)
    assert list(groups) == ["model.layers.0.mixer.lift_gamma"]


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    options = Optimizer(learning_rate=1e-3, multipliers=Multipliers(new=1, expanded=1, rest=0))
    with pytest.raises(RecipeError, match="no parameter has a learning rate"):
        groups_by_name(write_byte_gla(tmp_path / "base"), options)


# --- rows that surgery appended --------------------------------------------------------------------------------------------

WIDENED: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "gla": ("gla", {"num_kv_heads": 2, "use_short_conv": True, "conv_bias": True}, [{**WIDEN, "factor": 3}]),
    "gla, all three": ("gla", {}, [{**MERGE, "factor": 2}, {**WIDEN, "factor": 2}, LIFT]),
    "mamba2": ("mamba2", {"n_groups": 2, "use_bias": True}, [{**WIDEN, "factor": 2}]),
    "mamba": ("mamba", {}, [{**WIDEN, "factor": 2, "layers": [1]}]),
}
Parameters = dict[str, torch.Tensor]


def trained(path: Path, steps: int, rate: float = 1e-3, **multipliers: float) -> tuple[Parameters, Parameters]:
    """Parameters in fp64 as loaded, and after some steps of gradients that are the same for every rate."""
    options = Optimizer(learning_rate=rate, weight_decay=0.1, multipliers=Multipliers(**multipliers))
    model, optimizer = prepared(path, options, torch.float64)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_learning_rate(optimizer, rate)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.grad = gradient if parameter.requires_grad else None
        optimizer.step()
    return start, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=WIDENED)
def widened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with new rows, and a mask of them for each of its tensors."""
    folder, (family, config, plan) = tmp_path_factory.mktemp("widened"), WIDENED[request.param]
    expand(write(family, folder / "base", **config), folder / "wide", *plan)
    with open_checkpoint(folder / "wide") as checkpoint:
        masks = {name: torch.zeros(info.shape, dtype=torch.bool) for name, info in checkpoint.tensors.items()}
        for name, runs in new_rows(checkpoint.description, checkpoint.provenance).items():
            for run in runs:
                masks[name][run] = True
    assert any(mask.any() for mask in masks.values())
    return folder / "wide", masks


def test_new_rows_move_ten_times_as_far_in_a_step_and_all_else_as_before(widened: tuple[Path, Parameters]) -> None:
    path, masks = widened
    start, plain = trained(path, steps=1)
    _, fast = trained(path, steps=1, rows=10.0)
    for name, mask in masks.items():
        assert torch.equal(fast[name][~mask], plain[name][~mask]), name
        assert bool((plain[name] != start[name]).all()), name
        step = (plain[name] - start[name])[mask]
        torch.testing.assert_close((fast[name] - start[name])[mask], 10 * step, atol=1e-13, rtol=1e-10)


def test_new_rows_are_trained_as_at_ten_times_the_rate_weight_decay_and_moments_included(widened: tuple[Path, Parameters]) -> None:
    path, masks = widened
    (_, rows), (_, all_fast), (_, plain) = trained(path, 4, rows=10.0), trained(path, 4, rate=1e-2), trained(path, 4)
    for name, mask in masks.items():
        torch.testing.assert_close(rows[name], torch.where(mask, all_fast[name], plain[name]), atol=1e-13, rtol=1e-10)


def test_the_factor_of_rows_goes_on_top_of_that_of_their_tensor(widened: tuple[Path, Parameters]) -> None:
    path, masks = widened
    (start, plain), (_, fast) = trained(path, 1), trained(path, 1, rows=5.0, expanded=3.0)
    for name, mask in masks.items():
        torch.testing.assert_close((fast[name] - start[name])[mask], 15 * (plain[name] - start[name])[mask], atol=1e-13, rtol=1e-10)


def test_rows_of_a_frozen_tensor_stay(widened: tuple[Path, Parameters]) -> None:
    path, masks = widened
    start, after = trained(path, 2, rows=10.0, expanded=0.0)
    assert all(torch.equal(start[name], after[name]) for name, mask in masks.items() if mask.any())
    assert any(not torch.equal(start[name], after[name]) for name in masks)


@pytest.mark.parametrize(("wide", "rows", "works"), [(True, 10.0, True), (True, 1.0, False), (False, 10.0, False)])
def test_a_step_without_faster_rows_does_no_more_work_than_before(tmp_path: Path, wide: bool, rows: float, works: bool) -> None:
    path = write("gla", tmp_path / "base")
    if wide:
        expand(path, tmp_path / "wide", {**WIDEN, "factor": 2})
        path = tmp_path / "wide"
    _, optimizer = prepared(path, Optimizer(learning_rate=1e-3, multipliers=Multipliers(rows=rows)))
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    assert [len(hook) for hook in hooks] == [int(works)] * 2


# --- the rate ------------------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_linearly_and_ends_at_its_ratio() -> None:
    schedule = Schedule(max_steps=100, warmup_steps=10, min_ratio=0.2)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(2.0 * 0.6)
    assert rates[-1] == pytest.approx(0.4)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_without_warm_up_and_cosine_the_rate_is_constant() -> None:
    schedule = Schedule(max_steps=5, min_ratio=1.0)
    assert [learning_rate(step, 5, 3.0, schedule) for step in range(1, 6)] == [3.0] * 5


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_stops_at_once(loss: float, norm: float) -> None:
    assert LossGuard(SpikeGuard()).check(loss, norm)


def test_only_spikes_in_a_row_stop_a_run_and_are_kept_out_of_the_median() -> None:
    guard = LossGuard(SpikeGuard(factor=2, patience=3, window=10))
    assert not any(guard.check(1.0, 1.0) for _ in range(10))
    assert [guard.check(5.0, 1.0), guard.check(5.0, 1.0), guard.check(1.0, 1.0)] == [None] * 3
    assert guard.calm
    assert [guard.check(5.0, 1.0), guard.check(5.0, 1.0)] == [None] * 2
    assert not guard.calm
    message = guard.check(5.0, 1.0)
    assert message is not None
    assert "2 times its median 1" in message


def test_a_slowly_falling_loss_never_looks_like_a_spike() -> None:
    guard = LossGuard(SpikeGuard(factor=1.5, patience=1, window=20))
    assert not any(guard.check(5 * 0.99**step, 1.0) for step in range(300))
