"""`preserve`: every new degree of freedom can move, and moves on its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statex
from tests.surgery.helpers import GLA_VARIANTS, LIFT, MAMBA2_VARIANTS, MERGE, WIDEN, expand, provenance, tensors, tokens, write

CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "merge": ("gla", {}, [{**MERGE, "factor": 2}]),
    "merge, scalar, all heads": ("gla", {}, [{**MERGE, "mixing": "scalar"}]),
    "merge, grouped queries, convolution": ("gla", GLA_VARIANTS["four of eight kv heads, short conv"], [MERGE]),
    "lift gla": ("gla", {}, [LIFT]),
    "merge and lift": ("gla", {"num_kv_heads": 2}, [MERGE, LIFT]),
    "widen": ("mamba2", {}, [{**WIDEN, "factor": 2}]),
    "widen, groups and biases": ("mamba2", MAMBA2_VARIANTS["eight groups, biases"], [{**WIDEN, "factor": 3}]),
    "widen, B zero": ("mamba2", {"n_groups": 2, "use_bias": True}, [{**WIDEN, "factor": 2, "zero": "B"}]),
    "lift mamba2": ("mamba2", {"n_groups": 2}, [{**LIFT, "factor": 4}]),
    "widen and lift": ("mamba2", {"n_groups": 2}, [{**WIDEN, "factor": 2}, LIFT]),
}


def gradients_seen(path: Path, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Largest gradient of every number over some steps of Adam, and the parameters after them."""
    model = statex.load(path, dtype=torch.float64).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            seen[name] = torch.maximum(seen[name], parameter.grad.abs())
        optimizer.step()
    return seen, {name: parameter.detach() for name, parameter in model.named_parameters()}


def new_rows(name: str, groups: int, before: int, after: int, inner: int) -> list[int]:
    """Rows of a Mamba-2 tensor that widening added: behind the old ones of each group, first of B, then of C."""
    start = 2 * inner if "in_proj" in name else inner
    ranges = [(start + (side * groups + group) * after) for side in range(2) for group in range(groups)]
    return [row for first in ranges for row in range(first + before, first + after)]


@pytest.mark.parametrize(("family", "variant", "plan"), CASES.values(), ids=CASES)
def test_every_new_degree_of_freedom_gets_a_gradient_within_two_steps(
    tmp_path: Path, family: str, variant: dict[str, Any], plan: list[dict[str, Any]]
) -> None:
    base = write(family, tmp_path / "base", **variant)
    summary = expand(base, tmp_path / "out", *plan)
    seen, _ = gradients_seen(tmp_path / "out", steps=2)
    marked = provenance(tmp_path / "out")
    for name in marked["new"]:
        assert bool((seen[name] > 0).all()), name
    widened = next((row for row in summary.rows if row.operator == "widen_state"), None)
    for name in marked["expanded"]:
        assert widened is not None, "only widening grows tensors in preserve"
        before, after = widened.before, widened.after
        rows = new_rows(name, before.key_heads, before.key_dim, after.key_dim, before.value_heads * before.value_dim)
        assert bool((seen[name][rows] > 0).all()), name


@pytest.mark.parametrize("zero", ["B", "C"])
def test_zero_in_both_b_and_c_would_never_move(tmp_path: Path, zero: str) -> None:
    """The both-zero trap: with the drawn side zero too, no new row ever gets a gradient; with ours, all do."""
    base = write("mamba2", tmp_path / "base", num_hidden_layers=1)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "zero": zero})
    rows = new_rows("in_proj", 1, 8, 16, 64)
    name, conv_bias = "model.layers.0.mixer.in_proj.weight", "model.layers.0.mixer.conv1d.bias"
    drawn = tensors(tmp_path / "out")[name][rows]
    half = len(rows) // 2
    zeros, others = (drawn[:half], drawn[half:]) if zero == "B" else (drawn[half:], drawn[:half])
    assert not bool(zeros.any())
    assert bool((others != 0).all())

    from safetensors.torch import load_file, save_file

    file = next((tmp_path / "out").glob("*.safetensors"))
    broken = load_file(file)
    broken[name][rows] = 0
    broken[conv_bias][new_rows(conv_bias, 1, 8, 16, 64)] = 0
    save_file(broken, file, metadata={"format": "pt"})
    seen, _ = gradients_seen(tmp_path / "out", steps=2)
    assert not bool(seen[name][rows].any())


@pytest.mark.parametrize("zero", ["B", "C"])
def test_new_rows_part_from_the_old_ones_and_from_each_other(tmp_path: Path, zero: str) -> None:
    """The copied-rows trap: equal rows get equal gradients for ever and the state never grows in rank."""
    base = write("mamba2", tmp_path / "base", num_hidden_layers=1)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 3, "zero": zero})
    _, after = gradients_seen(tmp_path / "out", steps=2)
    inner, state = 64, 24
    for start in (2 * inner, 2 * inner + state):
        rows = after["model.layers.0.mixer.in_proj.weight"][start : start + state]
        assert torch.linalg.matrix_rank(rows) == state
        assert float(torch.cdist(rows, rows).add(torch.eye(state)).min()) > 1e-4


def test_copied_rows_never_part(tmp_path: Path) -> None:
    """Why `inherit` is an ablation only: its equal rows stay equal under training."""
    base = write("mamba2", tmp_path / "base", num_hidden_layers=1)
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "init": "inherit"})
    _, after = gradients_seen(tmp_path / "out", steps=3)
    b = after["model.layers.0.mixer.in_proj.weight"][128:144]
    assert torch.allclose(b[:8], b[8:], atol=1e-9)


def test_widening_twice_draws_other_rows(tmp_path: Path) -> None:
    base = write("mamba2", tmp_path / "base", num_hidden_layers=1)
    expand(base, tmp_path / "twice", {**WIDEN, "factor": 2})
    expand(tmp_path / "twice", tmp_path / "four times", {**WIDEN, "factor": 2})
    b = tensors(tmp_path / "four times")["model.layers.0.mixer.in_proj.weight"][128 : 128 + 32]
    assert torch.linalg.matrix_rank(b.double()) == 32
    assert float(torch.nn.functional.cosine_similarity(b[8:16], b[16:24]).abs().max()) < 0.99
