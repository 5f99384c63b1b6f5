"""extend_spectrum: what each init does, with what it composes, where it is refused, and that a state can count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import statex
from statex.checkpoints import export_native, inspect_checkpoint, open_checkpoint
from statex.errors import ExportError, PlanError
from statex.kernels import ssd
from statex.models import hgrn
from tests.surgery.helpers import (
    GLA_VARIANTS,
    LIFT,
    MERGE,
    WIDEN,
    expand,
    largest_difference,
    logits,
    provenance,
    tensors,
    tokens,
    write,
)

EXTEND = {"operator": "extend_spectrum", "layers": "all"}
RHO = "model.layers.{}.mixer.spectrum_rho"
PLANS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], tuple[int, ...]]] = {
    "gla": ("gla", {}, [EXTEND], (4, 1)),
    "gla, two kv heads, short conv": ("gla", GLA_VARIANTS["two kv heads, short conv with bias"], [EXTEND], (2, 1)),
    "gla, merged": ("gla", {}, [EXTEND, {**MERGE, "factor": 2}], (2, 2)),
    "gla, merged (scalar) and lifted": ("gla", {}, [{**MERGE, "mixing": "scalar"}, LIFT, EXTEND], (1, 4)),
    "hgrn2": ("hgrn2", {}, [EXTEND], (4, 1)),
    "hgrn2, merged and lifted": ("hgrn2", {}, [EXTEND, {**MERGE, "factor": 2}, LIFT], (2, 2)),
    "mamba": ("mamba", {}, [EXTEND], (64,)),
    "mamba, widened and lifted": ("mamba", {}, [{**WIDEN, "factor": 2}, LIFT, EXTEND], (64,)),
    "mamba2": ("mamba2", {"n_groups": 2}, [EXTEND], (8,)),
    "mamba2, widened and lifted": ("mamba2", {"n_groups": 2}, [{**WIDEN, "factor": 2}, EXTEND, LIFT], (8,)),
}


def with_rho(folder: Path) -> Path:
    """The checkpoint as if ρ had been trained: anything from about -2 to 2."""
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    for name in weights:
        if name.endswith("spectrum_rho"):
            weights[name] = torch.randn(weights[name].shape)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("family", "variant", "plan", "shape"), PLANS.values(), ids=PLANS)
def test_an_extended_spectrum_starts_where_it_was(
    tmp_path: Path, family: str, variant: dict[str, Any], plan: list[dict[str, Any]], shape: tuple[int, ...]
) -> None:
    """`preserve`: one ρ = 0 per source head, in fp32, whatever the order in the plan."""
    base = write(family, tmp_path / "base", **variant)
    expand(base, tmp_path / "out", *plan)
    assert torch.equal(tensors(tmp_path / "out")[RHO.format(0)], torch.zeros(shape))
    assert largest_difference(base, tmp_path / "out") < 1e-10


@pytest.mark.parametrize(("family", "variant", "plan", "shape"), PLANS.values(), ids=PLANS)
def test_every_rho_gets_a_gradient_at_once(
    tmp_path: Path, family: str, variant: dict[str, Any], plan: list[dict[str, Any]], shape: tuple[int, ...]
) -> None:
    expand(write(family, tmp_path / "base", **variant), tmp_path / "out", *plan)
    model = statex.load(tmp_path / "out", dtype=torch.float64).train()
    model(tokens(), labels=tokens()).loss.backward()
    for layer in model.model.layers:
        assert bool((layer.mixer.spectrum_rho.grad != 0).all())


@pytest.mark.parametrize(("family", "variant", "plan", "shape"), PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("init", ["preserve", "inherit"])
def test_extended_models_read_alike_in_chunks_token_by_token_and_by_the_reference(
    tmp_path: Path, family: str, variant: dict[str, Any], plan: list[dict[str, Any]], shape: tuple[int, ...], init: str
) -> None:
    """The cache holds true states: reading 9 tokens at once and 15 one by one ends where reading 24 does."""
    plan = [{**entry, "init": init} if entry is EXTEND else entry for entry in plan]
    expand(write(family, tmp_path / "base", **variant), tmp_path / "out", *plan)
    model = statex.load(with_rho(tmp_path / "out"), dtype=torch.float64)
    ids = tokens()
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :9], use_cache=True)
        parts = [first.logits]
        for t in range(9, ids.shape[1]):
            parts.append(model(ids[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True).logits)
    assert float((torch.cat(parts, 1) - whole).abs().max()) < 1e-10
    assert float((logits(tmp_path / "out", backend="reference") - whole).abs().max()) < 1e-10


REDRAWN = {
    "gla": {"gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias"},
    "hgrn2": {"f_proj.weight"},
    "mamba": {"A_log", "dt_proj.weight", "dt_proj.bias"},
    "mamba2": {"A_log", "dt_bias"},
    "delta_net": {"b_proj.weight"},
    "gated_deltanet": {"b_proj.weight"},
}


@pytest.mark.parametrize("family", REDRAWN)
def test_inherit_has_the_papers_eigenvalues_and_keeps_every_weight(tmp_path: Path, family: str) -> None:
    """The same function as the learned form at its end, ρ -> ∞, where s = tanh(ρ) = 1 and r = 2 sigmoid(ρ) = 2."""
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "fixed", {**EXTEND, "init": "inherit"})
    before, after = tensors(base), tensors(tmp_path / "fixed")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert largest_difference(base, tmp_path / "fixed") > 1e-3
    expand(base, tmp_path / "learned", EXTEND)
    file = next((tmp_path / "learned").glob("*.safetensors"))
    weights = load_file(file)
    save_file({name: x.fill_(40.0) if name.endswith("rho") else x for name, x in weights.items()}, file, metadata={"format": "pt"})
    assert largest_difference(tmp_path / "fixed", tmp_path / "learned") < 1e-10


@pytest.mark.parametrize("family", REDRAWN)
def test_reinit_draws_the_decays_and_nothing_else(tmp_path: Path, family: str) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "out", {**EXTEND, "layers": [0], "init": "reinit"})
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.mixer.{name}" for name in REDRAWN[family]}
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert [layer.spectrum for layer in checkpoint.description.layers] == ["fixed", None]


@pytest.mark.parametrize(("family", "growth"), [("gla", {**MERGE, "factor": 2}), ("gla", LIFT), ("mamba2", {**WIDEN, "factor": 2})])
def test_a_trained_spectrum_can_be_expanded_further(tmp_path: Path, family: str, growth: dict[str, Any]) -> None:
    base = write(family, tmp_path / "base")
    expand(base, tmp_path / "extended", EXTEND)
    expand(with_rho(tmp_path / "extended"), tmp_path / "out", growth)
    before, after = tensors(tmp_path / "extended")[RHO.format(1)], tensors(tmp_path / "out")[RHO.format(1)]
    assert torch.equal(before.flatten(), after.flatten())
    assert RHO.format(1) in provenance(tmp_path / "out")["new"]
    assert largest_difference(tmp_path / "extended", tmp_path / "out") < 1e-10


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "twice": ([EXTEND], EXTEND, "extended already, as far below 0 as it learns to .layer 0"),
    "twice, fixed": ([{**EXTEND, "init": "inherit"}], {**EXTEND, "layers": [1]}, "extended already, to -1 .layer 1"),
    "a factor": ([LIFT], {**EXTEND, "factor": 2}, "leaves the state's size alone"),
    "merged by inherit": ([EXTEND], {**MERGE, "init": "inherit"}, "cannot keep each head's learned spectrum"),
}


@pytest.mark.parametrize(("first", "second", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_spectrum_cannot_take_is_refused(
    tmp_path: Path, first: list[dict[str, Any]], second: dict[str, Any], message: str
) -> None:
    expand(write("gla", tmp_path / "base"), tmp_path / "first", *first)
    with pytest.raises(PlanError, match=message):
        expand(tmp_path / "first", tmp_path / "out", second)


@pytest.mark.parametrize("family", ["gla", "mamba2", "mamba", "hgrn2"])
@pytest.mark.parametrize("init", ["preserve", "inherit"])
def test_no_stock_checkpoint_holds_an_extended_spectrum(tmp_path: Path, family: str, init: str) -> None:
    expand(write(family, tmp_path / "base"), tmp_path / "out", {**EXTEND, "layers": [1], "init": init})
    with pytest.raises(ExportError, match="layer 1 carries eigenvalues below 0"):
        export_native(tmp_path / "out", tmp_path / "native")


def test_inspect_warns_where_decays_are_roots_and_says_what_is_extended(tmp_path: Path) -> None:
    notes = {}
    for family in ("gla", "mamba2"):
        base = write(family, tmp_path / family)
        expand(base, tmp_path / f"{family}-out", EXTEND)
        for path in (base, tmp_path / f"{family}-out"):
            inspection = inspect_checkpoint(path)
            notes[path.name] = next(note for note in inspection.operators if note.name == "extend_spectrum")
        assert "eigenvalues below 0 learned" in inspection.rows[0].state
    assert [note.applicable for note in notes.values()] == [True, False, True, False]
    assert "root of order 16" in notes["gla"].reason
    assert "under -11" in notes["gla"].reason
    assert "warning" not in notes["mamba2"].reason


def test_keys_of_hgrn2_stay_one_minus_the_plain_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the mixer hands to the kernel: keys 1 - f beside log f, and the spectrum apart."""
    expand(write("hgrn2", tmp_path / "base"), tmp_path / "out", {**EXTEND, "init": "inherit"})
    seen = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> tuple[Tensor, None]:
        seen.append((k, log_decay, options["spectrum"]))
        return v, None

    monkeypatch.setattr(hgrn, "gla", kernel)
    logits(tmp_path / "out")
    for k, log_decay, spectrum in seen:
        assert torch.allclose(k, 1 - log_decay.exp(), atol=1e-12)
        assert torch.equal(spectrum, torch.ones_like(spectrum))
    assert len(seen) == 2


def test_one_extended_head_counts_modulo_two_and_no_plain_one_can() -> None:
    """Parity by hand: a' = -1 at a 1 and 1 at a 0, one write at the start. With decays in [0, 1] the sign could never change."""
    bits = torch.randint(2, (1, 300, 1))
    bits[0, 0] = 0
    dt = torch.where(bits == 1, 40.0, 0.0)
    x = torch.zeros(1, 300, 1, 1)
    start = torch.ones(1, 1, 1, 1)
    ones = torch.ones(1, 300, 1, 1)
    y, _ = ssd(x, dt, -torch.ones(1), ones, ones, spectrum=torch.ones(1), initial_state=start)
    parity = 1 - 2 * (bits[..., None].cumsum(1) % 2)
    assert float((y - parity).abs().max()) < 1e-5
    plain, _ = ssd(x, dt, -torch.ones(1), ones, ones, initial_state=start)
    assert bool((plain >= 0).all())
