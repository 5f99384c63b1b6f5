"""What holds for the mixers of the delta rule beyond their equality with fla."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import statex
from tests.fixtures import write_gated_deltanet
from tests.models.build import build, tokens


@pytest.mark.parametrize("name", ["delta_net-expanded", "gated_deltanet-expanded"])
def test_a_step_of_training_is_one_graph(name: str) -> None:
    """No value is looked at on the way, so nothing waits for a device, and the step can be captured."""
    model, ids = build(name).train(), tokens(2, 70)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_what_sets_eigenvalues_stays_fp32_in_a_half_precision_model(tmp_path: Path) -> None:
    model = statex.load(write_gated_deltanet(tmp_path / "half", dtype=torch.bfloat16))
    dtypes = {name.rpartition("mixer.")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in ("a_proj.weight", "b_proj.weight", "A_log", "dt_bias")} == {torch.float32}
    assert dtypes["q_proj.weight"] == dtypes["o_norm.weight"] == torch.bfloat16


@torch.no_grad()
def test_half_precision_logits_are_near_those_of_fp32(tmp_path: Path) -> None:
    folder, ids = write_gated_deltanet(tmp_path / "model", num_heads=2, num_v_heads=4), tokens(2, 40)
    exact, half = (statex.load(folder, dtype=dtype)(ids).logits.float() for dtype in (torch.float32, torch.bfloat16))
    # bf16 keeps 8 bits and three layers add up their rounding. The median: where a query finds nothing the output norm enlarges it.
    assert ((half - exact).norm(dim=-1) / exact.norm(dim=-1)).median() < 0.05
