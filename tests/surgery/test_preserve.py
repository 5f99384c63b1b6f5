"""`preserve`: the expanded model computes its source's function.

In float64 the two may differ by rounding only: the sums have the same terms, some joined by exact zeros, in another order. 1e-10 on
logits of the order of 1 is a thousand times what rounding makes and far below any wrong permutation. In float32 the bound is 2e-5
for the same reason.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import write_mamba_ssm
from tests.surgery.helpers import (
    GLA_VARIANTS,
    LIFT,
    MAMBA2_VARIANTS,
    MERGE,
    WIDEN,
    expand,
    largest_difference,
    logits,
    provenance,
    tensors,
    write,
)

FP64, FP32 = 1e-10, 2e-5

GLA_PLANS = {
    "merge by 2, channel": [{**MERGE, "factor": 2}],
    "merge by 2, scalar": [{**MERGE, "factor": 2, "mixing": "scalar"}],
    "merge all": [MERGE],
    "lift": [LIFT],
    "merge then lift": [{**MERGE, "factor": 2}, LIFT],
    "merge (scalar) then lift by 3": [{**MERGE, "factor": 2, "mixing": "scalar"}, {**LIFT, "factor": 3}],
}
MAMBA2_PLANS = {
    "widen by 4": [{**WIDEN, "factor": 4}],
    "widen by 3, B zero": [{**WIDEN, "factor": 3, "zero": "B"}],
    "lift by 4": [{**LIFT, "factor": 4}],
    "widen then lift": [{**WIDEN, "factor": 2}, {**LIFT, "factor": 3}],
}


@pytest.mark.parametrize("plan", GLA_PLANS.values(), ids=GLA_PLANS)
@pytest.mark.parametrize("variant", GLA_VARIANTS.values(), ids=GLA_VARIANTS)
def test_gla_computes_the_same_function(tmp_path: Path, variant: dict[str, Any], plan: list[dict[str, Any]]) -> None:
    base = write("gla", tmp_path / "base", **variant)
    expand(base, tmp_path / "out", *plan)
    assert largest_difference(base, tmp_path / "out") < FP64


@pytest.mark.parametrize("plan", MAMBA2_PLANS.values(), ids=MAMBA2_PLANS)
@pytest.mark.parametrize("variant", MAMBA2_VARIANTS.values(), ids=MAMBA2_VARIANTS)
def test_mamba2_computes_the_same_function(tmp_path: Path, variant: dict[str, Any], plan: list[dict[str, Any]]) -> None:
    base = write("mamba2", tmp_path / "base", **variant)
    expand(base, tmp_path / "out", *plan)
    assert largest_difference(base, tmp_path / "out") < FP64


@pytest.mark.parametrize("operation", [{**WIDEN, "factor": 2}, LIFT], ids=["widen", "lift"])
def test_original_mamba2_checkpoint_computes_the_same_function(tmp_path: Path, operation: dict[str, Any]) -> None:
    base = write_mamba_ssm(tmp_path / "base", ssm_cfg={"ngroups": 2})
    expand(base, tmp_path / "out", operation)
    assert largest_difference(base, tmp_path / "out") < FP64


@pytest.mark.parametrize("family", ["gla", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stored_dtype_is_kept_and_function_too(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base = write(family, tmp_path / "base", dtype=dtype)
    grown = {**MERGE, "factor": 2} if family == "gla" else {**WIDEN, "factor": 2}
    expand(base, tmp_path / "out", grown, LIFT)
    before, after, new = tensors(base), tensors(tmp_path / "out"), provenance(tmp_path / "out")["new"]
    assert all(after[name].dtype == before[name].dtype == dtype for name in before)
    assert new
    assert all(after[name].dtype == torch.float32 for name in new)
    assert largest_difference(base, tmp_path / "out") < FP64


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_fp32_runs_agree_to_fp32_rounding(tmp_path: Path, family: str) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "out", MERGE if family == "gla" else {**WIDEN, "factor": 4}, LIFT)
    assert largest_difference(base, tmp_path / "out", torch.float32) < FP32


def test_a_wrong_query_order_would_be_seen(tmp_path: Path) -> None:
    """The bound above means something: undo the permutation of o_proj alone and the logits move by far more."""
    base = write("gla", tmp_path / "base", num_kv_heads=2)
    expand(base, tmp_path / "out", MERGE)
    from safetensors.torch import load_file, save_file

    file = next((tmp_path / "out").glob("*.safetensors"))
    changed = load_file(file)
    name = "model.layers.0.mixer.o_proj.weight"
    changed[name] = tensors(base)[name]
    save_file(changed, file, metadata={"format": "pt"})
    assert largest_difference(base, tmp_path / "out") > 1e-3


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_untouched_layers_keep_their_bytes(tmp_path: Path, family: str) -> None:
    base = write(family, tmp_path / "base", num_hidden_layers=3)
    grown = {**MERGE, "factor": 2} if family == "gla" else {**WIDEN, "factor": 2}
    expand(base, tmp_path / "out", {**grown, "layers": [1]})
    before, after = tensors(base), tensors(tmp_path / "out")
    outside = [name for name in after if not name.startswith("model.layers.1.")]
    assert set(before) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert largest_difference(base, tmp_path / "out") < FP64


@pytest.mark.parametrize("init", ["inherit", "reinit"])
@pytest.mark.parametrize(
    ("family", "operation"), [("gla", MERGE), ("mamba2", {**WIDEN, "factor": 2}), ("gla", LIFT), ("mamba2", LIFT)]
)
def test_other_inits_change_the_function(tmp_path: Path, family: str, operation: dict[str, Any], init: str) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "out", {**operation, "init": init})
    assert largest_difference(base, tmp_path / "out") > 1e-3
    assert bool(logits(tmp_path / "out").isfinite().all())
