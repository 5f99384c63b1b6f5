"""What `statex inspect` says, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from statex.checkpoints import Inspection, inspect_checkpoint
from statex.families import LayerDescription
from statex.surgery.operators import OPERATORS
from tests.checkpoints.test_native_export import canonical
from tests.fixtures import WRITERS, write_gla, write_hgrn, write_mamba2


def printed(inspection: Inspection) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(inspection.table())
    return console.export_text()


def test_parameters_and_state_are_counted_from_shapes(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(write_mamba2(tmp_path / "ckpt", dtype=torch.bfloat16, n_groups=2, tie_word_embeddings=True))
    from transformers import Mamba2ForCausalLM

    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "ckpt")
    assert inspection.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert inspection.weight_bytes == 2 * inspection.parameters
    assert inspection.dtype == "bfloat16"
    # Per layer 8 heads x [8, 8] in fp32, and 3 last inputs of 64 + 2*2*8 convolution channels in bf16.
    assert [row.state_elements for row in inspection.rows] == [512] * 3
    assert [row.conv_elements for row in inspection.rows] == [288] * 3
    assert inspection.state_elements == 3 * (512 + 288)
    assert inspection.state_bytes == 3 * (512 * 4 + 288 * 2)


def test_heads_that_share_keys_count_once_in_the_state(tmp_path: Path) -> None:
    shared = inspect_checkpoint(write_gla(tmp_path / "shared", num_kv_heads=2))
    plain = inspect_checkpoint(write_gla(tmp_path / "plain"))
    assert 2 * shared.state_elements == plain.state_elements
    assert shared.rows[0].state == "2 × [4, 8] (4 queries)"


def test_operators_come_with_the_reason_why_or_why_not(tmp_path: Path) -> None:
    notes = {note.name: note for note in inspect_checkpoint(write_gla(tmp_path / "four", num_heads=4)).operators}
    assert (notes["merge_heads"].applicable, notes["lift_keys"].applicable) == (True, True)
    assert "2 or 4 of 4 key/value heads" in notes["merge_heads"].reason
    notes = {note.name: note for note in inspect_checkpoint(write_gla(tmp_path / "one", num_kv_heads=1, expand_k=0.25)).operators}
    assert (notes["merge_heads"].applicable, notes["lift_keys"].applicable) == (False, False)
    assert "one key/value head already" in notes["merge_heads"].reason


EXPECTED: dict[str, dict[str, str | None]] = {
    "hgrn (fla)": {
        "outer_product": None, "merge_heads": "hgrn lacks", "widen_state": "hgrn lacks", "lift_keys": "outer_product first",
        "extend_spectrum": "hgrn lacks",
    },
    "hgrn2 (fla)": {
        "outer_product": "hgrn2 lacks; for hgrn", "merge_heads": None, "widen_state": "for gla, mamba or mamba2", "lift_keys": None,
        "extend_spectrum": None,
    },
    "mamba (transformers)": {
        "outer_product": "mamba lacks", "merge_heads": "mamba lacks", "widen_state": None, "lift_keys": None,
        "extend_spectrum": None,
    },
}  # fmt: skip
"""By checkpoint and operator: None where it applies, else part of the reason why not."""


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_operator_is_listed_with_whether_it_applies_and_why(tmp_path: Path, kind: str) -> None:
    notes = {note.name: note for note in inspect_checkpoint(WRITERS[kind](tmp_path / "ckpt")).operators}
    assert notes.keys() == EXPECTED[kind].keys() == OPERATORS.keys()
    for name, why_not in EXPECTED[kind].items():
        assert notes[name].applicable is (why_not is None), name
        assert notes[name].reason
        assert why_not is None or why_not in notes[name].reason
    text = printed(inspect_checkpoint(tmp_path / "ckpt"))
    assert all(f"{name}: {'yes' if note.applicable else 'no'}, " in text for name, note in notes.items())


def test_an_expanded_hgrn_says_what_its_layers_are(tmp_path: Path) -> None:
    def grow(index: int, layer: LayerDescription) -> LayerDescription:
        return layer.replace(query_heads=4, key_heads=4, value_heads=4, key_dim=8, value_dim=8, outer="added" if index else "alone")

    inspection = inspect_checkpoint(canonical(write_hgrn(tmp_path / "source"), tmp_path / "ckpt", grow))
    assert [row.state for row in inspection.rows][:2] == ["4 × [8, 8]", "4 × [8, 8] (and its diagonal)"]
    assert not next(note for note in inspection.operators if note.name == "outer_product").applicable


@pytest.mark.parametrize(("write", "operator"), [(write_gla, "merge_heads"), (write_mamba2, "widen_state")])
def test_lifted_layers_can_be_neither_merged_nor_widened(tmp_path: Path, write: Callable[..., Path], operator: str) -> None:
    path = canonical(write(tmp_path / "source"), tmp_path / "lifted", lambda index, layer: layer.replace(lift=2))
    note = next(note for note in inspect_checkpoint(path).operators if note.name == operator)
    assert not note.applicable
    assert "lifted" in note.reason


@pytest.mark.parametrize("dialect", WRITERS)
def test_the_table_and_the_dict_name_family_dialect_and_layers(tmp_path: Path, dialect: str) -> None:
    inspection = inspect_checkpoint(WRITERS[dialect](tmp_path / "ckpt"))
    assert dialect in printed(inspection)
    assert "0-2" in printed(inspection)
    assert json.loads(json.dumps(inspection.to_dict()))["rows"][2]["layer"] == 2


def test_layers_that_differ_have_rows_of_their_own_and_say_how(tmp_path: Path) -> None:
    path = canonical(
        write_gla(tmp_path / "source"), tmp_path / "ckpt", lambda index, layer: layer.replace(lift=2) if index == 1 else layer
    )
    inspection = inspect_checkpoint(path)
    assert inspection.expanded is not None
    text = printed(inspection)
    assert "gla (fla, expanded)" in text
    assert "0, 2" in text
    assert "4 × [8, 8] (lifted ×2)" in text
