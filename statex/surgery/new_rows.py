"""Which rows of a checkpoint's tensors surgery appended: what `widen_state` gave to keys and queries, or Mamba's B and C.

They start where they do nothing, inside tensors whose other rows are trained, so a recipe lets them move at a rate of their own.
Everything is read off the record that surgery left: a stock checkpoint has no new rows, nor has one whose keys and queries an init
drew afresh, since then none of them is newer than another. New channels' decays are copies, not rows that have to open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families import get_family
from ..families.description import LayerDescription, ModelDescription
from . import gla_rows, mamba2_rows, mamba_rows
from .operators import OPERATORS, lift_keys, merge_heads, widen_state


class KeyRows(NamedTuple):
    """Where a family keeps its keys and queries.

    Attributes:
        names: tensors of a layer whose first dimension runs over (head, key channel), among other things.
        select: (name, a tensor's rows, layer) -> those rows alone, in their order.
    """

    names: tuple[str, ...]
    select: Callable[[str, Tensor, LayerDescription], Tensor]


KEY_ROWS: dict[str, KeyRows] = {
    "gla": KeyRows((*gla_rows.QUERIES, *gla_rows.KEYS), lambda name, rows, layer: rows),
    "mamba2": KeyRows(mamba2_rows.NAMES, lambda name, rows, layer: torch.cat(mamba2_rows.split_rows(name, rows, layer)[1:3])),
    "mamba": KeyRows((mamba_rows.PROJECTION,), lambda name, rows, layer: torch.cat(mamba_rows.split_rows(rows, layer)[1:])),
}
"""A family that takes `widen_state`, the one operator that appends rows, has a line here."""


def new_rows(model: ModelDescription, provenance: Mapping[str, Any]) -> dict[str, list[slice]]:
    """Runs of rows that surgery appended, whichever expansion of a stack it was, by the canonical names of their tensors.

    Args:
        model: of the checkpoint as it is. provenance: what surgery wrote down ({}: nothing).

    Raises:
        CheckpointError: the record is of other layers than these.
    """
    if model.family not in KEY_ROWS:
        return {}
    tensors, (names, select) = get_family(model.family).tensors(model), KEY_ROWS[model.family]
    found = {}
    for index, layer in enumerate(model.layers):
        new = torch.tensor(_new_channels(layer, list(_operations(provenance, index)), index))
        for name in names if new.any() else ():
            full_name = f"model.layers.{index}.{name}"
            if full_name in tensors:
                shape, _ = tensors[full_name]
                rows = select(name, torch.arange(shape[0]), layer).view(-1, layer.key_dim)
                found[full_name] = _runs(rows[:, new].flatten())
    return found


def _operations(provenance: Mapping[str, Any], layer: int) -> Iterator[Mapping[str, Any]]:
    """What was done to a layer's heads and keys, the earliest first."""
    if "previous" in provenance:
        yield from _operations(provenance["previous"], layer)
    relevant = (lift_keys.OPERATOR.name, merge_heads.OPERATOR.name, widen_state.OPERATOR.name)
    entries: Iterable[Mapping[str, Any]] = (provenance.get("plan") or {}).get("operations", ())
    mine = [entry for entry in entries if entry["operator"] in relevant and layer in entry["layers"]]
    yield from sorted(mine, key=lambda entry: OPERATORS[entry["operator"]].stage)


def _new_channels(layer: LayerDescription, operations: list[Mapping[str, Any]], index: int) -> list[bool]:
    """For each channel of a key, whether it was appended; it is the same in all heads of a layer."""
    widens, merges = widen_state.OPERATOR.name, merge_heads.OPERATOR.name
    longer = math.prod(operation["factor"] for operation in operations if operation["operator"] in (widens, merges))
    channels, rest = divmod(layer.key_dim, longer)
    if rest:
        raise CheckpointError(
            f"layer {index} has keys of {layer.key_dim} channels, and the surgery on record made them {longer} times as long",
            where="config.json",
            fix="Restore the config.json that belongs to these weights",
        )
    new, blocks = [False] * channels, 1
    for operation in operations:
        if operation["operator"] == merges:
            new *= operation["factor"]
            blocks *= operation["factor"] if operation["init"] == "preserve" else 1
        elif operation["operator"] == widens:  # each block gets its new channels behind its own
            size = len(new) // blocks
            added = [True] * (size * (operation["factor"] - 1))
            new = [channel for block in range(blocks) for channel in (*new[block * size : (block + 1) * size], *added)]
        if operation["init"] == "reinit":
            new = [False] * len(new)
            blocks = 1 if operation["operator"] == merges else blocks
    return new


def _runs(rows: Tensor) -> list[slice]:
    """Ascending rows as slices of consecutive ones."""
    parts = torch.tensor_split(rows, (rows.diff() > 1).nonzero().flatten() + 1)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
