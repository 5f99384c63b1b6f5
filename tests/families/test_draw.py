"""Fresh tensors follow the distributions that the families' own code uses."""

from __future__ import annotations

import math

import pytest
import torch

from statex.families import Init, ModelDescription, draw, get_family

MAMBA2 = get_family("mamba2").describe({"num_hidden_layers": 16}, {})
GLA = get_family("gla").describe({}, {})


def fresh(init: Init, *shape: int, model: ModelDescription = MAMBA2) -> torch.Tensor:
    return draw(init, shape, model=model, generator=torch.Generator().manual_seed(0))


def declared(family: str, name: str) -> Init:
    return next(spec.init for spec in get_family(family).layer_tensors if spec.name == name)


def test_glas_projections_are_xavier_uniform_with_flas_gain() -> None:
    ours = fresh(declared("gla", "mixer.q_proj.weight"), 300, 500)
    theirs = torch.nn.init.xavier_uniform_(torch.empty(300, 500), gain=2**-2.5)
    assert ours.abs().max() <= 2**-2.5 * math.sqrt(6 / 800)
    assert ours.std() == pytest.approx(theirs.std().item(), rel=0.02)


@pytest.mark.parametrize("shape", [(300, 500), (64, 1, 4)])
def test_kaiming_uniform_is_what_linear_and_conv_modules_start_with(shape: tuple[int, ...]) -> None:
    ours = fresh(declared("mamba2", "mixer.in_proj.weight"), *shape)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    assert bound * 0.9 < ours.abs().max() <= bound * (1 + 1e-6)


def test_mamba2s_output_projection_is_smaller_in_a_deeper_model() -> None:
    init = declared("mamba2", "mixer.out_proj.weight")
    shallow = get_family("mamba2").describe({"num_hidden_layers": 1}, {})
    assert fresh(init, 40, 40).mul(4).allclose(fresh(init, 40, 40, model=shallow))


def test_softplus_of_dt_bias_is_log_uniform_between_the_models_time_steps() -> None:
    step = torch.nn.functional.softplus(fresh(declared("mamba2", "mixer.dt_bias"), 20_000).double())
    assert 0.001 * 0.999 <= step.min() <= 0.0011
    assert 0.09 <= step.max() <= 0.1 * 1.001
    # Half of a log-uniform draw lies below the geometric mean.
    assert (step < 0.01).double().mean() == pytest.approx(0.5, abs=0.02)


def test_dt_bias_respects_the_floor() -> None:
    model = get_family("mamba2").describe({"time_step_min": 1e-6, "time_step_floor": 1e-2}, {})
    step = torch.nn.functional.softplus(fresh(declared("mamba2", "mixer.dt_bias"), 1000, model=model).double())
    assert step.min() >= 1e-2 * 0.999


def test_a_log_is_the_log_of_a_uniform_draw_from_1_to_16() -> None:
    rate = fresh(declared("mamba2", "mixer.A_log"), 20_000).exp()
    assert 1 <= rate.min() < 1.1
    assert 15.9 < rate.max() <= 16.001
    assert rate.mean() == pytest.approx(8.5, abs=0.15)


@pytest.mark.parametrize("rows", [3, 12])
def test_identity_mixing_lets_each_value_block_read_its_own_key_block(rows: int) -> None:
    mixing = fresh(declared("gla", "mixer.mixing"), 2, rows, 3)
    assert torch.equal(mixing, torch.eye(3).repeat_interleave(rows // 3, dim=0).expand(2, rows, 3))


def test_the_same_generator_gives_the_same_tensor_and_another_seed_another() -> None:
    init = declared("gla", "mixer.q_proj.weight")
    assert torch.equal(fresh(init, 4, 4), fresh(init, 4, 4))
    other = draw(init, (4, 4), model=GLA, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(fresh(init, 4, 4), other)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="orthogonal"):
        fresh(Init("orthogonal"), 2, 2)


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_every_declared_init_can_be_drawn(family: str) -> None:
    model = {"gla": GLA, "mamba2": MAMBA2}[family]
    layer = model.layers[0].replace(lift=2)
    if family == "gla":
        layer = layer.replace(mixing="scalar", blocks=2)
    for spec in get_family(family).layer_tensors:
        small = tuple(min(size, 8) for size in spec.shape(model, layer))
        assert fresh(spec.init, *small, model=model).isfinite().all(), spec.name
