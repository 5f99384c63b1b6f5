"""What a checkpoint is and what can be done with it, from its headers alone: no torch, no tensor read."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..families import FAMILIES
from ..families.description import LayerDescription
from ..families.gla import NO_START_AT_ZERO
from .reader import Checkpoint, open_checkpoint
from .tensor_info import SIZES

if TYPE_CHECKING:
    from rich.console import RenderableType

_STATE_ITEMSIZE = SIZES["float32"]
"""Recurrent states are kept in fp32, whatever the weights' dtype."""


@dataclass(frozen=True)
class LayerRow:
    """One layer: its description, and its state per sequence. `conv_elements` are the last inputs of its short convolutions."""

    layer: int
    description: LayerDescription
    state_elements: int
    conv_elements: int
    state_bytes: int
    parameters: int

    @property
    def state(self) -> str:
        """`4 × [64, 128]`, with what makes the layer unlike a stock one."""
        layer = self.description
        heads, key_dim, value_dim = layer.state_shape
        notes = [f"{layer.query_heads} queries"] if layer.query_heads > heads else []
        notes += ["and its diagonal"] if layer.outer == "added" else []
        notes += [f"mixes {layer.blocks} blocks"] if layer.mixing else []
        notes += [f"lifted ×{layer.lift}"] if layer.lift > 1 else []
        notes += [f"eigenvalues below 0 {layer.spectrum}"] if layer.spectrum else []
        return f"{heads} × [{key_dim}, {value_dim}]" + (f" ({', '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class OperatorNote:
    """Whether an operator can be applied, and why or why not."""

    name: str
    applicable: bool
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found.

    Attributes:
        path: the folder or hub id. family, dialect: what it is; the dialect of an expanded checkpoint is its source's.
        expanded: the plan that made it, or None.
        parameters: numbers of weights, tied ones once. weight_bytes: as stored. dtypes: number of tensors by dtype.
        state_elements, state_bytes: memory of one sequence in all layers, convolution inputs included: recurrent states in fp32,
            convolution inputs in the weights' dtype.
        rows: one per layer. operators: all that there are.
    """

    path: str
    family: str
    dialect: str
    expanded: dict[str, Any] | None
    hidden_size: int
    vocab_size: int
    tied: bool
    parameters: int
    weight_bytes: int
    dtypes: dict[str, int]
    state_elements: int
    state_bytes: int
    rows: tuple[LayerRow, ...]
    operators: tuple[OperatorNote, ...]

    @property
    def dtype(self) -> str:
        """The dtype of most tensors."""
        return max(self.dtypes, key=lambda name: self.dtypes[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self) | {"dtype": self.dtype}

    def table(self) -> RenderableType:
        """For a terminal: layers that are alike share a row."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        head = "tied" if self.tied else "untied"
        kind = f"{self.family} ({self.dialect}{', expanded' if self.expanded else ''})"
        dtypes = ", ".join(name if len(self.dtypes) == 1 else f"{name} in {count} tensors" for name, count in self.dtypes.items())
        table = Table()
        for column in ("layers", "state", "state elements", "convolution inputs", "state bytes", "parameters"):
            table.add_column(column, justify="left" if column in ("layers", "state") else "right")
        for rows in _alike(self.rows):
            first = rows[0]
            numbers = (first.state_elements, first.conv_elements, first.state_bytes, first.parameters)
            each = " each" if len(rows) > 1 else ""
            table.add_row(_ranges([row.layer for row in rows]), first.state, *(f"{number:,}{each}" for number in numbers))
        lines = [f"{note.name}: {'yes' if note.applicable else 'no'}, {note.reason}" for note in self.operators]
        return Group(
            Text(f"{self.path}: {kind}"),
            Text(f"{self.parameters:,} parameters, {dtypes}, hidden {self.hidden_size}, vocabulary {self.vocab_size} ({head})"),
            table,
            Text(f"memory of one sequence: {self.state_elements:,} elements, {self.state_bytes:,} bytes"),
            *map(Text, lines),
        )


def inspect_checkpoint(path_or_hub_id: str | Path, revision: str | None = None) -> Inspection:
    """Read a checkpoint's headers.

    Raises:
        CheckpointError: it cannot be read; see `open_checkpoint`.
    """
    with open_checkpoint(path_or_hub_id, revision) as checkpoint:
        rows = tuple(_row(checkpoint, index) for index in range(len(checkpoint.description.layers)))
        infos = checkpoint.tensors.values()
        return Inspection(
            path=checkpoint.name,
            family=checkpoint.family.name,
            dialect=checkpoint.dialect,
            expanded=checkpoint.provenance.get("plan"),
            hidden_size=checkpoint.description.hidden_size,
            vocab_size=checkpoint.description.vocab_size,
            tied=checkpoint.description.tie_word_embeddings,
            parameters=sum(info.numel for info in infos),
            weight_bytes=sum(info.nbytes for info in infos),
            dtypes=dict(Counter(info.dtype for info in infos).most_common()),
            state_elements=sum(row.state_elements + row.conv_elements for row in rows),
            state_bytes=sum(row.state_bytes for row in rows),
            rows=rows,
            operators=tuple(OperatorNote(name, *_note(name, checkpoint)) for name in _NOTES),
        )


def _row(checkpoint: Checkpoint, index: int) -> LayerRow:
    layer, prefix = checkpoint.description.layers[index], f"model.layers.{index}."
    convolutions = [
        checkpoint.tensors[prefix + spec.name] for spec in checkpoint.family.layer_tensors if _is_kernel(checkpoint, spec, prefix)
    ]
    inputs = [(info.shape[0] * (info.shape[2] - 1), SIZES[info.dtype]) for info in convolutions]
    return LayerRow(
        layer=index,
        description=layer,
        state_elements=layer.state_elements,
        conv_elements=sum(count for count, _ in inputs),
        state_bytes=layer.state_elements * _STATE_ITEMSIZE + sum(count * size for count, size in inputs),
        parameters=sum(info.numel for name, info in checkpoint.tensors.items() if name.startswith(prefix)),
    )


def _is_kernel(checkpoint: Checkpoint, spec: Any, prefix: str) -> bool:
    return spec.role == "conv" and prefix + spec.name in checkpoint.tensors


def _note(operator: str, checkpoint: Checkpoint) -> tuple[bool, str]:
    """Whether an operator applies, and why."""
    if operator in checkpoint.family.operators:
        return _NOTES[operator](checkpoint)
    takers = [family.name for family in FAMILIES.values() if operator in family.operators]
    return False, f"{_ACTS_ON[operator]}, which {checkpoint.family.name} lacks; for {_or(sorted(takers))}"


def _outer_note(checkpoint: Checkpoint) -> tuple[bool, str]:
    channels = max((layer.value_heads for layer in checkpoint.description.layers if layer.outer is None), default=None)
    if channels is None:
        return False, "every state is a matrix already"
    powers = [2**power for power in range(1, 8) if channels % 2**power == 0]
    return True, f"any divisor n of {channels} channels{f' ({_or(powers)}, ...)' if powers else ''}: state ×n"


def _merge_note(checkpoint: Checkpoint) -> tuple[bool, str]:
    layers = checkpoint.description.layers
    if max(layer.key_heads for layer in layers) == 1:
        return False, "every layer has one key/value head already"
    heads = max((layer.key_heads for layer in layers if layer.lift == 1), default=1)
    if heads == 1:
        return False, "the keys are lifted: merge the unlifted checkpoint, then lift"
    factors = [factor for factor in range(2, heads + 1) if heads % factor == 0]
    return True, f"merges {_or(factors)} of {heads} key/value heads into one: state ×{_or(factors)}"


def _widen_note(checkpoint: Checkpoint) -> tuple[bool, str]:
    sizes = sorted({layer.key_dim for layer in checkpoint.description.layers if layer.lift == 1})
    if not sizes:
        return False, "the keys are lifted: widen the unlifted checkpoint, then lift"
    if checkpoint.family.name != "gla":
        return True, f"any multiple of d_state {_or(sizes)}"
    feature_map = checkpoint.description.mixer["feature_map"]
    reason = NO_START_AT_ZERO.get(feature_map)
    alone = "" if reason is None else f"; by inherit or reinit alone: {feature_map} {reason}"
    return True, f"any multiple of a key's {_or(sizes)} channels{alone}"


def _lift_note(checkpoint: Checkpoint) -> tuple[bool, str]:
    if max(layer.key_dim for layer in checkpoint.description.layers) == 1:
        return False, "the state is a vector, without keys: use outer_product first, or both in one plan"
    # From half the channels on, rolled products repeat: docs/surgery.md.
    room = max(((layer.key_dim - 1) // 2 + 1) // layer.lift for layer in checkpoint.description.layers)
    if room < 2:
        return False, "the keys have too few channels for another different product"
    return True, f"up to ×{room}"


def _spectrum_note(checkpoint: Checkpoint) -> tuple[bool, str]:
    if all(layer.spectrum for layer in checkpoint.description.layers):
        return False, "eigenvalues reach below 0 already"
    normalizer = checkpoint.description.mixer.get("gate_logit_normalizer", 1)
    if normalizer > 1:
        # a' = 2a - 1 is negative where sigmoid(logit)^(1/normalizer) < 1/2.
        return True, (
            f"eigenvalues from [0, 1] to [-1, 1]; warning: a decay here is the root of order {normalizer:g} of a gate, below 1/2"
            f" only for logits under {-normalizer * math.log(2):.0f}: it would forget faster, and no parity is expected of it"
        )
    return True, "eigenvalues from [0, 1] to [-1, 1]; the state's size stays"


_NOTES: dict[str, Callable[[Checkpoint], tuple[bool, str]]] = {
    "outer_product": _outer_note,
    "merge_heads": _merge_note,
    "widen_state": _widen_note,
    "lift_keys": _lift_note,
    "extend_spectrum": _spectrum_note,
}


_ACTS_ON = {
    "outer_product": "it makes matrices of vector states",
    "merge_heads": "it joins the keys of heads that have keys of their own",
    "widen_state": "it makes keys longer that are neither normalised nor made of the decays",
    "lift_keys": "it appends products of channels to keys",
    "extend_spectrum": "it lets a matrix state's decays, or its steps, reach below 0",
}
"""What each operator works on."""


def _or(choices: Sequence[int | str]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, choices[:-1])), str(choices[-1])]))


def _alike(rows: tuple[LayerRow, ...]) -> list[list[LayerRow]]:
    """Rows that differ in their layer's number only, in the order in which they first come."""
    groups: dict[Any, list[LayerRow]] = {}
    for row in rows:
        groups.setdefault((row.description, row.conv_elements, row.state_bytes, row.parameters), []).append(row)
    return list(groups.values())


def _ranges(numbers: list[int]) -> str:
    """`0, 6, 12-14`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
