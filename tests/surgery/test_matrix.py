"""Every family with every operator that it takes, and every init: one table of cases, and what holds for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import statex
from statex.checkpoints import export_native, inspect_checkpoint, open_checkpoint
from statex.errors import ExportError
from statex.families import FAMILIES
from statex.models import StatexForCausalLM
from statex.surgery import ExpansionSummary
from statex.surgery.operators import OPERATORS
from tests.surgery.helpers import expand, largest_difference, logits, provenance, tokens, write
from tests.surgery.test_gradients import gradients_seen

ROUNDING = 1e-10
"""In float64 `preserve` differs from its source by rounding only; see test_preserve.py."""


@dataclass(frozen=True)
class Case:
    """A checkpoint and what is done to it.

    Attributes:
        family: of the checkpoint. config: keys that differ from the fixture's.
        plan: entries without their init; all layers where they name none.
        growth: how many times larger the recurrent state becomes.
        inits: those that the family defines for the operator.
    """

    family: str
    plan: tuple[dict[str, Any], ...]
    growth: int
    config: dict[str, Any] = field(default_factory=dict)
    inits: tuple[str, ...] = ("preserve", "inherit", "reinit")


def entry(operator: str, factor: int | None = None, **options: Any) -> dict[str, Any]:
    """A plan's entry on all layers."""
    return {"operator": operator, "layers": "all", **({} if factor is None else {"factor": factor}), **options}


CASES: dict[str, Case] = {
    "gla, merge": Case("gla", (entry("merge_heads", 2),), 2),
    "gla, widen": Case("gla", (entry("widen_state", 4),), 4, {"num_kv_heads": 2}),
    "gla, lift": Case("gla", (entry("lift_keys", 2),), 2),
    "gla, extend": Case("gla", (entry("extend_spectrum"),), 1, {"num_kv_heads": 2}),
    "gla, all three": Case("gla", (entry("merge_heads", 2), entry("lift_keys", 3), entry("extend_spectrum")), 6),
    "gla, all four, convolutions": Case(
        "gla",
        (entry("merge_heads", 2), entry("widen_state", 2), entry("lift_keys", 2), entry("extend_spectrum")),
        8,
        {"use_short_conv": True, "conv_bias": True},
    ),
    "mamba2, widen": Case("mamba2", (entry("widen_state", 3),), 3, {"n_groups": 2}),
    "mamba2, lift": Case("mamba2", (entry("lift_keys", 4),), 4, {"n_groups": 2}),
    "mamba2, extend": Case("mamba2", (entry("extend_spectrum"),), 1, {"n_groups": 4}),
    "mamba2, all three": Case(
        "mamba2", (entry("widen_state", 2), entry("lift_keys", 3), entry("extend_spectrum")), 6, {"n_groups": 2}
    ),
    "delta_net, merge": Case("delta_net", (entry("merge_heads", 2),), 2),
    "delta_net, merge, scalar": Case("delta_net", (entry("merge_heads", mixing="scalar"),), 4, {"use_gate": True}, ("preserve",)),
    "delta_net, lift": Case("delta_net", (entry("lift_keys", 3),), 3, {"qk_norm": "sum", "qk_activation": "elu"}),
    "delta_net, extend": Case("delta_net", (entry("extend_spectrum"),), 1, {"use_short_conv": False}),
    "delta_net, all three": Case(
        "delta_net", (entry("merge_heads", 2), entry("lift_keys", 2), entry("extend_spectrum")), 4, {"conv_bias": True}
    ),
    "gated_deltanet, merge": Case("gated_deltanet", (entry("merge_heads", 4),), 4),
    "gated_deltanet, lift": Case("gated_deltanet", (entry("lift_keys", 3),), 3, {"use_gate": False}),
    "gated_deltanet, extend": Case("gated_deltanet", (entry("extend_spectrum"),), 1, {"tie_word_embeddings": True}),
    "gated_deltanet, grouped values, all three": Case(
        "gated_deltanet",
        (entry("merge_heads", 2), entry("lift_keys", 2), entry("extend_spectrum")),
        4,
        {"num_heads": 2, "num_v_heads": 6},
    ),
    "hgrn, outer product": Case("hgrn", (entry("outer_product", 8),), 8),
    "hgrn, outer product, convolutions": Case(
        "hgrn", (entry("outer_product", 4),), 4, {"use_short_conv": True, "conv_bias": True, "tie_word_embeddings": True}
    ),
    "hgrn, outer product, no bounds, no norm weight": Case(
        "hgrn", (entry("outer_product", 16),), 16, {"use_lower_bound": False, "elementwise_affine": False}
    ),
    "hgrn, outer product, wide": Case("hgrn", (entry("outer_product", 8),), 8, {"expand_ratio": 2}, ("preserve",)),
    "hgrn, outer product and lift": Case("hgrn", (entry("outer_product", 8), entry("lift_keys", 3)), 24),
    "hgrn2, merge": Case("hgrn2", (entry("merge_heads", 2),), 2),
    "hgrn2, merge, convolutions": Case("hgrn2", (entry("merge_heads"),), 4, {"use_short_conv": True, "conv_bias": True}),
    "hgrn2, lift": Case("hgrn2", (entry("lift_keys", 3),), 3),
    "hgrn2, merge and lift": Case("hgrn2", (entry("merge_heads", 2), entry("lift_keys", 2)), 4),
    "hgrn2, extend": Case("hgrn2", (entry("extend_spectrum"),), 1),
    "hgrn2, all three": Case("hgrn2", (entry("merge_heads", 2), entry("lift_keys", 3), entry("extend_spectrum")), 6),
    "mamba, widen": Case("mamba", (entry("widen_state", 3),), 3),
    "mamba, widen, S4D-real": Case("mamba", (entry("widen_state", 2, new_decays="continue"),), 2, {"use_bias": True}),
    "mamba, lift": Case("mamba", (entry("lift_keys", 4),), 4),
    "mamba, widen and lift": Case("mamba", (entry("widen_state", 2), entry("lift_keys", 3)), 6, {"use_conv_bias": False}),
    "mamba, extend": Case("mamba", (entry("extend_spectrum"),), 1),
    "mamba, all three": Case("mamba", (entry("widen_state", 2), entry("lift_keys", 3), entry("extend_spectrum")), 6),
}

STOCK: dict[tuple[str, str], set[str]] = {
    ("hgrn", "outer_product"): {"inherit", "reinit"},
    ("gla", "merge_heads"): {"inherit", "reinit"},
    ("gla", "widen_state"): {"preserve", "inherit", "reinit"},
    ("hgrn2", "merge_heads"): {"inherit", "reinit"},
    ("delta_net", "merge_heads"): {"inherit", "reinit"},
    ("gated_deltanet", "merge_heads"): {"inherit", "reinit"},
    ("mamba2", "widen_state"): {"preserve", "inherit", "reinit"},
    ("mamba", "widen_state"): {"preserve", "inherit", "reinit"},
    ("delta_net", "extend_spectrum"): {"inherit", "reinit"},
    ("gated_deltanet", "extend_spectrum"): {"inherit", "reinit"},
}
"""The inits after which a stock checkpoint of the family (of HGRN: an HGRN2) can hold what one operator made."""

BY_INIT = [(name, init) for name, case in CASES.items() for init in case.inits]


class Expanded(NamedTuple):
    """A case carried out."""

    case: Case
    init: str
    base: Path
    out: Path
    summary: ExpansionSummary


@pytest.fixture(scope="module", params=BY_INIT, ids="-".join)
def expanded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expanded:
    """Each case with each of its inits, expanded once for all tests."""
    name, init = request.param
    folder, case = tmp_path_factory.mktemp("case"), CASES[name]
    base = write(case.family, folder / "base", **case.config)
    summary = expand(base, folder / "out", *({**operation, "init": init} for operation in case.plan))
    return Expanded(case, init, base, folder / "out", summary)


def recurrent_elements(path: Path) -> int:
    """Numbers that the cache of a model's layers holds for one sequence, convolutions' inputs aside."""
    cache = statex.load(path)(tokens(batch=1, length=3), use_cache=True).past_key_values
    return sum(layer.recurrent.numel() for layer in cache.layers)


def test_preserve_keeps_the_function_and_the_other_inits_change_it(expanded: Expanded) -> None:
    difference = largest_difference(expanded.base, expanded.out)
    assert difference < ROUNDING if expanded.init == "preserve" else 1e-3 < difference < float("inf")


@pytest.mark.parametrize("expanded", [pair for pair in BY_INIT if pair[1] == "preserve"], indirect=True, ids="-".join)
def test_new_tensors_are_live_within_two_steps_of_preserve(expanded: Expanded) -> None:
    seen, _ = gradients_seen(expanded.out, steps=2)
    for name in provenance(expanded.out)["new"]:
        assert bool((seen[name] > 0).all()), name


@torch.no_grad()
def test_the_state_grows_as_told_and_is_what_the_cache_holds(expanded: Expanded) -> None:
    layers = {row.layer: row.after for row in expanded.summary.rows}
    told = sum(layer.state_elements for layer in layers.values())
    assert told == recurrent_elements(expanded.out) == expanded.case.growth * recurrent_elements(expanded.base)


def test_tensors_and_their_shapes_are_those_that_the_description_asks_for(expanded: Expanded) -> None:
    with open_checkpoint(expanded.out) as checkpoint:
        declared = {name: shape for name, (shape, _) in checkpoint.family.tensors(checkpoint.description).items()}
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == declared
        assert checkpoint.description.layers == tuple(
            {row.layer: row.after for row in expanded.summary.rows}[index] for index in range(len(checkpoint.description.layers))
        )


@torch.no_grad()
def test_generation_with_the_cache_says_what_a_whole_reading_says(expanded: Expanded) -> None:
    model = statex.load(expanded.out, dtype=torch.float64)
    prompt = tokens(batch=2, length=5)
    told = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    greedy = model(told[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :].argmax(-1)
    assert torch.equal(told[:, prompt.shape[1] :], greedy)


@torch.no_grad()
def test_what_is_saved_and_loaded_again_computes_the_same(expanded: Expanded, tmp_path: Path) -> None:
    model = statex.load(expanded.out)
    model.save_pretrained(tmp_path / "saved")
    again = StatexForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_the_fp64_reference_and_the_default_kernels_agree(expanded: Expanded) -> None:
    assert float((logits(expanded.out) - logits(expanded.out, backend="reference")).abs().max()) < ROUNDING


def test_native_export_computes_the_same_or_is_refused_as_the_table_says(expanded: Expanded, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    operators = [operation["operator"] for operation in expanded.case.plan]
    if all(expanded.init in STOCK.get((expanded.case.family, operator), set()) for operator in operators):
        export_native(expanded.out, stock)
        with open_checkpoint(stock) as checkpoint:
            assert not checkpoint.is_expanded
        assert largest_difference(expanded.out, stock) < ROUNDING
    else:
        with pytest.raises(ExportError):
            export_native(expanded.out, stock)
        assert not stock.exists()


def test_inspect_says_beforehand_that_the_operator_applies(expanded: Expanded) -> None:
    notes = {note.name: note.applicable for note in inspect_checkpoint(expanded.base).operators}
    assert notes[expanded.case.plan[0]["operator"]]


def test_every_operator_of_every_family_is_in_the_table() -> None:
    tried = {(case.family, operation["operator"]) for case in CASES.values() for operation in case.plan}
    promised = {(family.name, operator) for family in FAMILIES.values() for operator in family.operators}
    assert promised <= tried
    assert {operator for _, operator in tried} <= OPERATORS.keys()
