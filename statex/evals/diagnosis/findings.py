"""What a diagnosis found, as data: JSON in and out, and the layers that would gain."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EvaluationError
from ...models.openness import Openness
from ..result import write_text, writing
from ..statistics import Difference
from .memory import LayerMemory

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA_VERSION = 1
DIAGNOSIS_FILE = "diagnosis.json"
PLAN_FILE = "plan.yaml"

SHARE_OF_LARGEST = 0.5
"""A layer would gain if cutting it loses at least this share of the most that cutting any layer loses. In benchmarks/auto_layers.py
layers above it raised recall when their state grew, and layers with 0.2 to 0.35 of the largest loss hardly did."""


@dataclass(frozen=True)
class LayerFinding:
    """One layer.

    Attributes:
        layer: its index. state: `heads × [K, V]`. state_elements: per sequence.
        lost: recall that is lost when the layer's long memory is cut, corrected (Holm) over the layers.
        heads: the same for each head, corrected over the heads of all layers; empty where heads were not cut.
        memory: what its state holds on real text; None where that was not measured.
        opened: tensors that surgery added, and how far they have moved.
    """

    layer: int
    state: str
    state_elements: int
    lost: Difference
    heads: list[Difference]
    memory: LayerMemory | None
    opened: list[Openness]


@dataclass(frozen=True)
class Diagnosis:
    """Where a checkpoint keeps what it recalls.

    Attributes:
        checkpoint: name, path, sha256 by file, parameters, state elements: what was diagnosed.
        probe: what was asked, in words. recall: of the whole model. recall_without: with the long memory of all layers cut.
        lost_by_all: the difference of the two.
        layers: one finding a layer.
        plan: for the layers that would gain, as `statex expand --plan` reads it; None where none would, and `advice` says why.
        advice: sentences for the reader.
    """

    checkpoint: dict[str, Any]
    probe: str
    rows: int
    recall: float
    recall_without: float
    lost_by_all: Difference
    layers: list[LayerFinding]
    plan: dict[str, Any] | None
    advice: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    created: str
    schema_version: int = SCHEMA_VERSION
    paths: list[Path] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return str(self.checkpoint["name"])

    @property
    def gaining_layers(self) -> list[int]:
        """Layers that would gain from a larger state, by what cutting them loses; ascending."""
        return gaining_layers({finding.layer: finding.lost for finding in self.layers})

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` is its inverse. What is infinite (a half-life beyond the horizon) becomes null."""
        plain = asdict(self)
        del plain["paths"]
        return _finite(plain) | {"gaining_layers": self.gaining_layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """Inverse of `to_dict`. Raises `TypeError` or `KeyError` on unknown or missing fields."""
        plain = {key: value for key, value in data.items() if key != "gaining_layers"}
        plain["checkpoint"]["name"]
        return cls(**plain | {"lost_by_all": _difference(plain["lost_by_all"]), "layers": [_layer(one) for one in plain["layers"]]})

    def table(self) -> Group:
        """For a terminal."""
        from ..report import diagnosis_table

        return diagnosis_table(self)

    def save(self, out: str | Path) -> list[Path]:
        """Write `diagnosis.json`, `plan.yaml` (if there is one), `report.html`, `report.md` and figures; returns their paths."""
        import yaml

        from ..reports import diagnosis_document, write_document

        with writing(out) as folder:
            paths = [folder / DIAGNOSIS_FILE]
            write_text(paths[0], json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            if self.plan is not None:
                paths.append(folder / PLAN_FILE)
                write_text(paths[1], yaml.safe_dump(self.plan, sort_keys=False, default_flow_style=None, width=120))
            return [*paths, *write_document(diagnosis_document(self), folder)]


def gaining_layers(lost: Mapping[int, Difference]) -> list[int]:
    """Layers where cutting the memory is shown to lose recall, and loses at least half of the most that any layer loses."""
    most = max((loss.value for loss in lost.values() if loss.shown), default=0.0)
    return sorted(layer for layer, loss in lost.items() if loss.shown and loss.value >= SHARE_OF_LARGEST * most > 0)


def load_diagnosis(path: str | Path) -> Diagnosis:
    """Read a diagnosis back from `diagnosis.json` or the folder that holds it.

    Raises:
        EvaluationError: no such file, no JSON, or written by another schema.
    """
    target = Path(path)
    if target.is_dir():
        target = target / DIAGNOSIS_FILE
    fix = "Run `statex diagnose CHECKPOINT -o FOLDER`"
    try:
        data = json.loads(target.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError("there is no diagnosis here", where=str(target), fix=fix) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"the diagnosis is not valid JSON ({error})", where=str(target), fix=fix) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise EvaluationError(
            f"the diagnosis has schema version {version}, this statex reads {SCHEMA_VERSION}", where=str(target), fix=fix
        )
    try:
        return Diagnosis.from_dict(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(f"the diagnosis lacks or misnames a field ({error})", where=str(target), fix=fix) from error


def _layer(data: Mapping[str, Any]) -> LayerFinding:
    memory = data["memory"]
    if memory is not None:
        memory = LayerMemory(**memory | {"half_life": [math.inf if tokens is None else tokens for tokens in memory["half_life"]]})
    return LayerFinding(
        **dict(data)
        | {
            "lost": _difference(data["lost"]),
            "heads": [_difference(head) for head in data["heads"]],
            "memory": memory,
            "opened": [Openness(**one) for one in data["opened"]],
        }
    )


def _difference(data: Mapping[str, Any]) -> Difference:
    return Difference(**dict(data) | {"low": _bound(data["low"], -math.inf), "high": _bound(data["high"], math.inf)})


def _bound(x: float | None, unknown: float) -> float:
    return unknown if x is None else x


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
