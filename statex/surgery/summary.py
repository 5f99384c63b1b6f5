"""What a plan does to a checkpoint, in numbers: the table that `statex expand` prints, before or after writing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..families.base import Family
from ..families.description import LayerDescription
from .lazy import LazyTensor

if TYPE_CHECKING:
    from rich.table import Table

STATE_ITEMSIZE = 4
"""Recurrent states are kept in fp32, whatever the weights' dtype."""


@dataclass(frozen=True)
class Cost:
    """What one layer, or a whole model, holds and moves.

    Attributes:
        state_elements: numbers of one sequence's state: the recurrent state and the last inputs of the short convolutions.
        state_bytes: bytes of the same: the recurrent state in fp32, the convolutions' inputs in their weights' dtype.
        parameters: numbers of weights.
        weight_bytes: bytes of the weights that are read for a token. An embedding table of which a token reads one row counts
            as that row; a tied table is read whole, as the head.
    """

    state_elements: int
    state_bytes: int
    parameters: int
    weight_bytes: int

    @property
    def decode_bytes(self) -> int:
        """Memory traffic of one generated token of one sequence: weights read once, the state read and written."""
        return self.weight_bytes + 2 * self.state_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def to_dict(self) -> dict[str, int]:
        """Plain data, `decode_bytes` included."""
        return dataclasses.asdict(self) | {"decode_bytes": self.decode_bytes}


def layer_cost(layer: LayerDescription, tensors: Mapping[str, LazyTensor], family: Family) -> Cost:
    """Cost of one layer, from its description and its tensors by their names within the layer."""
    convolutions = {spec.name for spec in family.layer_tensors if spec.role == "conv"}
    inputs = [(tensor, tensor.shape[0] * (tensor.shape[2] - 1)) for name, tensor in tensors.items() if name in convolutions]
    return Cost(
        state_elements=layer.state_elements + sum(count for _, count in inputs),
        state_bytes=layer.state_elements * STATE_ITEMSIZE + sum(count * tensor.dtype.itemsize for tensor, count in inputs),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        weight_bytes=sum(tensor.bytes for tensor in tensors.values()),
    )


def backbone_cost(tensors: Mapping[str, LazyTensor], *, tied: bool) -> Cost:
    """Cost of all that lies outside the layers."""
    row = "model.embeddings.weight"
    read = sum(tensor.bytes // (tensor.shape[0] if name == row and not tied else 1) for name, tensor in tensors.items())
    return Cost(0, 0, sum(tensor.elements for tensor in tensors.values()), read)


@dataclass(frozen=True)
class ExpansionRow:
    """One operator on one layer."""

    layer: int
    operator: str
    init: str
    factor: int
    before: LayerDescription
    after: LayerDescription
    cost_before: Cost
    cost_after: Cost

    @property
    def label(self) -> str:
        """`lift_keys ×4, preserve`; operators that enlarge nothing have no factor."""
        return f"{self.operator}{f' ×{self.factor}' if self.factor > 1 else ''}, {self.init}"

    @property
    def new_parameters(self) -> int:
        """Weights that the layer has now and had not before."""
        return self.cost_after.parameters - self.cost_before.parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {name: getattr(self, name) for name in ("layer", "operator", "init", "factor", "new_parameters")}
        sides = {"before": (self.before, self.cost_before), "after": (self.after, self.cost_after)}
        return plain | {side: dataclasses.asdict(layer) | cost.to_dict() for side, (layer, cost) in sides.items()}


@dataclass(frozen=True)
class ExpansionSummary:
    """What `expand_checkpoint` did, or would do.

    Attributes:
        source: the checkpoint's folder or hub id.
        out: the folder written, or None after a dry run.
        family: name of its family.
        plan: the resolved plan as data.
        rows: one for each operator on each layer, in the order in which they ran.
        before, after: cost of the whole model.
    """

    source: str
    out: Path | None
    family: str
    plan: dict[str, Any]
    before: Cost
    after: Cost
    rows: tuple[ExpansionRow, ...] = field(default=())

    @property
    def new_parameters(self) -> int:
        """Weights that the model has now and had not before."""
        return self.after.parameters - self.before.parameters

    @property
    def state_growth(self) -> float:
        """State elements after over before."""
        return self.after.state_elements / self.before.state_elements

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "source": self.source,
            "out": None if self.out is None else str(self.out),
            "family": self.family,
            "plan": self.plan,
            "layers": [row.to_dict() for row in self.rows],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "state_growth": self.state_growth,
            "new_parameters": self.new_parameters,
            "new_parameters_percent": 100 * self.new_parameters / self.before.parameters,
        }

    def table(self) -> Table:
        """The summary for a terminal; state sizes are per sequence, decode traffic per generated token and sequence."""
        from rich.table import Table

        title = f"{self.source}: {self.family}, state ×{self.state_growth:.2f}, parameters +{self._percent()}"
        table = Table(title=title, show_footer=True, title_justify="left")
        before, after = self.before, self.after
        table.add_column("layer", "all", justify="right")
        table.add_column("operator", overflow="fold")
        table.add_column("heads × [key, value]")
        table.add_column("state elements", arrow(before.state_elements, after.state_elements), justify="right")
        table.add_column("state bytes", arrow(before.state_bytes, after.state_bytes, binary), justify="right")
        table.add_column("new parameters", f"{self.new_parameters:,}", justify="right")
        table.add_column("decode bytes", arrow(before.decode_bytes, after.decode_bytes, binary), justify="right")
        for row in self.rows:
            was, now = row.cost_before, row.cost_after
            table.add_row(
                str(row.layer),
                row.label,
                f"{heads(row.before)} → {heads(row.after)}",
                arrow(was.state_elements, now.state_elements),
                arrow(was.state_bytes, now.state_bytes, binary),
                f"{row.new_parameters:,}",
                arrow(was.decode_bytes, now.decode_bytes, binary),
            )
        return table

    def _percent(self) -> str:
        return f"{100 * self.new_parameters / self.before.parameters:.2f} %"


def heads(layer: LayerDescription) -> str:
    """`4 × [64, 128]`: states and their shape; with the number of queries where states are read by several."""
    count, key_dim, value_dim = layer.state_shape
    shared = f" ({layer.query_heads} queries)" if layer.query_heads > count else ""
    return f"{count} × [{key_dim}, {value_dim}]{shared}"


def arrow(before: int, after: int, show: Any = None) -> str:
    """`before → after`."""
    show = show or (lambda count: f"{count:,}")
    return f"{show(before)} → {show(after)}"


def binary(count: int) -> str:
    """Bytes in KiB, MiB or GiB, to three digits."""
    power = min(3, int(math.log2(count) // 10)) if count else 0
    return f"{count} B" if power == 0 else f"{count / 1024**power:.4g} {'KMG'[power - 1]}iB"
