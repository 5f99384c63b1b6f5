"""The reference against code that we did not write."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from statex.kernels import gla, ssd
from tests.kernels.inputs import DECAYS, distance, gla_inputs, ssd_inputs


@pytest.fixture(scope="module")
def fla_naive() -> ModuleType:
    """The file alone: importing fla as a package needs triton."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive", Path(package.submodule_search_locations[0]) / "ops/gla/naive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("decay", DECAYS)
def test_gla_reference_equals_flas_naive_recurrence(fla_naive: ModuleType, decay: str) -> None:
    inputs = gla_inputs(33, decay, key_dim=5, value_dim=7)
    o, state = gla(**inputs, scale=5**-0.5, output_final_state=True, backend="reference")
    theirs = fla_naive.naive_recurrent_gla(
        inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], inputs["initial_state"], output_final_state=True
    )
    assert distance(o, theirs[0]) < 1e-6
    assert distance(state, theirs[1]) < 1e-6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("decay", ["none", "mild", "strong"])
def test_ssd_reference_equals_transformers_chunk_scan(groups: int, decay: str) -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    inputs = ssd_inputs(37, decay, groups=groups)
    y, state = ssd(**inputs, output_final_state=True, backend="reference")
    theirs, their_state = modeling.mamba2_chunk_scan(
        *(inputs[name] for name in ("x", "dt", "A", "B", "C")),
        chunk_size=16,
        D=inputs["D"],
        initial_states=inputs["initial_state"].mT,
        return_final_states=True,
    )
    assert distance(y, theirs) < 2e-6
    assert distance(state, their_state.mT) < 2e-6


def test_scalar_mixing_equals_channel_mixing_with_constant_rows() -> None:
    inputs = gla_inputs(9, "strong", mixing="scalar")
    scalar, _ = gla(**inputs, scale=1.0, backend="reference")
    inputs["mixing"] = inputs["mixing"].repeat_interleave(3, 1)
    channel, _ = gla(**inputs, scale=1.0, backend="reference")
    assert distance(scalar, channel) < 1e-7


def test_identity_mixing_equals_separate_heads() -> None:
    inputs = gla_inputs(20, "strong", heads=1, key_dim=6, value_dim=10)
    del inputs["initial_state"]
    merged, _ = gla(**inputs, mixing=torch.eye(2)[None], scale=0.3, backend="reference")
    separate = {name: x.unflatten(-1, (2, -1)).flatten(2, 3) for name, x in inputs.items()}
    heads, _ = gla(**separate, scale=0.3, backend="reference")
    assert distance(merged, heads.flatten(2)[:, :, None]) < 1e-7


def test_zero_lift_gamma_leaves_outputs_alone() -> None:
    inputs = gla_inputs(20, "strong", lift=3)
    inputs["lift_gamma"] = torch.zeros_like(inputs["lift_gamma"])
    lifted, _ = gla(**inputs, scale=0.3, backend="reference")
    inputs["initial_state"] = inputs["initial_state"][:, :, :6]
    del inputs["lift_gamma"]
    plain, _ = gla(**inputs, scale=0.3, backend="reference")
    assert distance(lifted, plain) < 1e-7


def test_query_head_reads_the_state_of_its_group() -> None:
    inputs = gla_inputs(12, "strong", heads=2, group=3)
    grouped, _ = gla(**inputs, scale=1.0, backend="reference")
    for name in ("k", "v", "log_decay"):
        inputs[name] = inputs[name].repeat_interleave(3, 2)
    inputs["initial_state"] = inputs["initial_state"].repeat_interleave(3, 1)
    repeated, _ = gla(**inputs, scale=1.0, backend="reference")
    assert distance(grouped, repeated) < 1e-7
