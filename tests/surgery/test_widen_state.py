"""widen_state: where new rows go, what they hold under each init, and where it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statex.errors import PlanError
from tests.surgery.helpers import LIFT, WIDEN, expand, provenance, tensors, write

INNER, GROUPS, STATE, HEADS = 64, 2, 8, 8
MIXER = "model.layers.0.mixer."


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write("mamba2", tmp_path / "base", n_groups=GROUPS, use_bias=True, num_hidden_layers=1)


def grouped(tensor: Tensor, name: str, state: int) -> dict[str, Tensor]:
    """A tensor's rows by their meaning; B and C as `[groups, state, ...]`."""
    sizes = {"z": INNER, "x": INNER, "B": GROUPS * state, "C": GROUPS * state, "dt": HEADS}
    if "conv1d" in name:
        sizes = {part: sizes[part] for part in "xBC"}
    parts = dict(zip(sizes, tensor.split(list(sizes.values())), strict=True))
    return parts | {side: parts[side].unflatten(0, (GROUPS, state)) for side in "BC"}


def both(base: Path, out: Path, name: str, factor: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    full = MIXER + name
    return grouped(tensors(base)[full], name, STATE), grouped(tensors(out)[full], name, STATE * factor)


@pytest.mark.parametrize("init", ["preserve", "inherit"])
@pytest.mark.parametrize("name", ["in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"])
def test_old_rows_stay_and_new_ones_go_to_the_end_of_their_group(tmp_path: Path, base: Path, init: str, name: str) -> None:
    expand(base, tmp_path / "out", {**WIDEN, "factor": 3, "init": init})
    before, after = both(base, tmp_path / "out", name, 3)
    for part in before:
        kept = after[part][:, :STATE] if part in "BC" else after[part]
        assert torch.equal(kept, before[part]), part


@pytest.mark.parametrize(("zero", "drawn"), [("C", "B"), ("B", "C")])
def test_preserve_zeroes_one_side_with_its_biases_and_draws_the_other(tmp_path: Path, base: Path, zero: str, drawn: str) -> None:
    expand(base, tmp_path / "out", {**WIDEN, "factor": 9, "zero": zero})
    for name in ("in_proj.weight", "in_proj.bias", "conv1d.bias"):
        _, after = both(base, tmp_path / "out", name, 9)
        assert not bool(after[zero][:, STATE:].any()), name
        assert bool(after[drawn][:, STATE:].any()), name
    before, after = both(base, tmp_path / "out", "in_proj.weight", 9)
    for group in range(GROUPS):
        old, new = before[drawn][group].std(), after[drawn][group, STATE:].std()
        assert float(new) == pytest.approx(float(old), rel=0.1)


def test_preserve_copies_convolution_taps_on_both_sides(tmp_path: Path, base: Path) -> None:
    expand(base, tmp_path / "out", {**WIDEN, "factor": 3})
    before, after = both(base, tmp_path / "out", "conv1d.weight", 3)
    assert all(torch.equal(after[side], before[side].repeat(1, 3, 1, 1)) for side in "BC")


@pytest.mark.parametrize("name", ["in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"])
def test_inherit_repeats_rows_within_each_group(tmp_path: Path, base: Path, name: str) -> None:
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "init": "inherit"})
    before, after = both(base, tmp_path / "out", name, 2)
    assert all(torch.equal(after[side], torch.cat([before[side]] * 2, dim=1)) for side in "BC")


@pytest.mark.parametrize("init", ["preserve", "inherit", "reinit"])
def test_only_b_and_c_change(tmp_path: Path, base: Path, init: str) -> None:
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "init": init})
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in after if before[name].shape != after[name].shape}
    assert changed == {MIXER + name for name in ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias")}
    assert changed == set(provenance(tmp_path / "out")["expanded"])
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - changed)
    for name in changed:
        old, new = both(base, tmp_path / "out", name.removeprefix(MIXER), 2)
        assert all(torch.equal(old[part], new[part]) for part in old.keys() - {"B", "C"}), name


def test_reinit_draws_b_and_c_by_the_familys_init(tmp_path: Path, base: Path) -> None:
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "init": "reinit"})
    before, after = both(base, tmp_path / "out", "in_proj.weight", 2)
    bound = 32**-0.5
    for side in "BC":
        assert bound * 0.95 < float(after[side].abs().max()) <= bound
        assert not torch.equal(after[side][:, :STATE], before[side])
    _, bias = both(base, tmp_path / "out", "conv1d.bias", 2)
    assert not bool(bias["B"].any() or bias["C"].any())


def test_reinit_decay_resets_what_the_papers_code_resets(tmp_path: Path, base: Path) -> None:
    expand(base, tmp_path / "out", {**WIDEN, "factor": 2, "init": "reinit", "reinit_decay": True})
    before, after = tensors(base), tensors(tmp_path / "out")
    assert torch.equal(after[MIXER + "dt_bias"], torch.ones(HEADS))
    assert torch.equal(after[MIXER + "norm.weight"], torch.ones(INNER))
    assert not torch.equal(after[MIXER + "A_log"], before[MIXER + "A_log"])
    assert float(after[MIXER + "A_log"].exp().min()) >= 1
    assert torch.equal(after[MIXER + "D"], before[MIXER + "D"])
    same = {**WIDEN, "factor": 2, "init": "reinit"}
    expand(base, tmp_path / "kept", same)
    kept = tensors(tmp_path / "kept")
    assert all(torch.equal(kept[MIXER + name], before[MIXER + name]) for name in ("dt_bias", "A_log", "norm.weight"))


def test_a_copied_convolution_bias_would_change_the_function(tmp_path: Path, base: Path) -> None:
    """Why C's new biases are zero: silu(bias) is not."""
    from safetensors.torch import load_file, save_file

    from tests.surgery.helpers import largest_difference

    expand(base, tmp_path / "out", {**WIDEN, "factor": 2})
    file = next((tmp_path / "out").glob("*.safetensors"))
    weights = load_file(file)
    bias = grouped(weights[MIXER + "conv1d.bias"], "conv1d", 2 * STATE)["C"]
    bias[:, STATE:] = bias[:, :STATE]
    save_file(weights, file, metadata={"format": "pt"})
    assert largest_difference(base, tmp_path / "out") > 1e-3


def test_new_parameters_are_those_of_the_formula(tmp_path: Path, base: Path) -> None:
    """2·(f-1)·G·N·(d_model + taps), and two biases a row here."""
    summary = expand(base, tmp_path / "out", {**WIDEN, "factor": 4}, dry_run=True)
    assert summary.new_parameters == 2 * 3 * GROUPS * STATE * (32 + 4 + 2)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (None, {**WIDEN, "factor": 1}, "factor 1 does not enlarge"),
        (LIFT, {**WIDEN, "factor": 2}, "keys are lifted"),
    ],
)
def test_what_is_not_defined_is_refused_with_layer_and_remedy(
    tmp_path: Path, base: Path, first: dict[str, Any] | None, second: dict[str, Any], words: str
) -> None:
    if first is not None:
        expand(base, tmp_path / "first", first)
        base = tmp_path / "first"
    with pytest.raises(PlanError, match=words) as caught:
        expand(base, tmp_path / "out", second)
    assert caught.value.where == "layer 0"
    assert caught.value.fix
