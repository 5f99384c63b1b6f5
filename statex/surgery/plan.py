"""Plans: which operator on which layers, as YAML, as a dictionary, or as a command line's few options.

    seed: 0
    operations:
      - {operator: merge_heads, layers: "every:6", factor: 4, init: preserve, mixing: channel}
      - {operator: lift_keys, layers: [1, 2], factor: 2}

An entry's keys are `operator`, `layers` and the fields of that operator's options dataclass. Layers with settings of their own are
entries of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import PlanError
from ..families.base import Family
from ..families.description import ModelDescription
from .operator import Operator, Options
from .operators import OPERATORS


class Subject(Protocol):
    """What a plan is resolved against; a `Checkpoint` is one."""

    @property
    def family(self) -> Family: ...
    @property
    def description(self) -> ModelDescription: ...


@dataclass(frozen=True)
class Operation:
    """One operator with its options on explicit layers."""

    operator: Operator
    layers: tuple[int, ...]
    options: Options
    family: str

    def to_dict(self) -> dict[str, Any]:
        """The entry as written in a plan, with every option that its init, and the family, reads."""
        read = [field.name for field in dataclasses.fields(self.options) if self._reads(field)]
        return {"operator": self.operator.name, "layers": list(self.layers), **{name: getattr(self.options, name) for name in read}}

    def _reads(self, field: dataclasses.Field[Any]) -> bool:
        told = getattr(self.options, field.name) != field.default
        known = field.metadata.get("family") in (None, self.family) or told
        return known and field.metadata.get("only") in (None, self.options.init)


@dataclass(frozen=True)
class Plan:
    """A resolved plan: layers and factors are explicit, so it reads the same on its own."""

    seed: int
    operations: tuple[Operation, ...]

    def for_layer(self, index: int) -> list[Operation]:
        """The operations on one layer in the order in which they run."""
        return sorted((op for op in self.operations if index in op.layers), key=lambda op: op.operator.stage)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data; `resolve_plan(checkpoint, plan=...)` reads it back."""
        return {"seed": self.seed, "operations": [operation.to_dict() for operation in self.operations]}

    def to_yaml(self) -> str:
        """The plan as a file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)


def resolve_plan(
    checkpoint: Subject,
    *,
    operator: str | None = None,
    factor: int | None = None,
    layers: str | int | Iterable[int] | None = None,
    init: str | None = None,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | str | Path | None = None,
    plan_file: str | Path | None = None,
) -> Plan:
    """Turn a plan file, a plan as data, or a few options into a `Plan` for this checkpoint.

    Args:
        checkpoint: gives the family and the layers.
        operator, factor, layers, init, options: one operation; what is left out is the family's paper plan, with init `preserve`.
        seed: of every random draw; overrides the seed of a plan; 0 when neither is given.
        plan, plan_file: a whole plan, as data or as a file, instead of the above.

    Raises:
        PlanError: unknown operator, key or value, an operator that the family cannot take, a layer out of range or named twice for
            one operator, an unreadable file.
    """
    single = {"operator": operator, "layers": layers, "factor": factor, "init": init}
    single = {name: value for name, value in single.items() if value is not None} | dict(options or {})
    if plan is not None and plan_file is not None:
        raise PlanError("a plan and a plan file were both given", fix="Give one of them")
    if isinstance(plan, str | Path):
        plan_file, plan = plan, None
    if plan_file is not None:
        plan = read_plan(plan_file)
    where = "the plan" if plan_file is None else str(plan_file)
    if plan is None:
        plan = {"operations": [single]}
    elif single:
        raise PlanError(f"a plan and `{next(iter(single))}` were both given", where=where, fix="Write it into the plan's entries")
    _require_keys(plan, ("seed", "operations"), where)
    entries = plan.get("operations")
    if not isinstance(entries, list) or not entries:
        raise PlanError("`operations` must be a list of at least one entry", where=where, fix="See docs/surgery.md for an example")
    chosen_seed = plan.get("seed", 0) if seed is None else seed
    if type(chosen_seed) is not int or not 0 <= chosen_seed < 2**63:
        raise PlanError(f"`seed` must be a whole number from 0 on, not {chosen_seed!r}", where=where, fix="Use a number such as 0")
    operations = [
        operation
        for number, entry in enumerate(entries, start=1)
        for operation in _resolve_entry(entry, checkpoint, where if len(entries) == 1 else f"{where}, entry {number}")
    ]
    _refuse_repeats(operations, where)
    return Plan(chosen_seed, tuple(operations))


def read_plan(path: str | Path) -> Mapping[str, Any]:
    """A plan file's data. Raises `PlanError` when it is missing or no YAML mapping."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"the plan cannot be read: {error.strerror}", where=str(path), fix="Check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[-1].strip()
        raise PlanError(f"the plan is not valid YAML: {line}", where=str(path), fix="Mend that line") from error
    if not isinstance(data, Mapping):
        raise PlanError(
            "the plan must hold the keys `seed` and `operations`", where=str(path), fix="See docs/surgery.md for an example"
        )
    return data


def _resolve_entry(entry: Any, checkpoint: Subject, where: str) -> list[Operation]:
    """One entry; several operations if layers differ in the factor that is left to them."""
    if not isinstance(entry, Mapping):
        raise PlanError(f"an entry must hold keys such as `operator`, not {entry!r}", where=where, fix="See docs/surgery.md")
    family, description = checkpoint.family, checkpoint.description
    operator = _find_operator(entry.get("operator", family.default_operator), family, where)
    fields = [field.name for field in dataclasses.fields(operator.options)]
    _require_keys(entry, ("operator", "layers", *fields), where)
    papers = operator.name == family.default_operator
    spec = entry.get("layers", family.default_layers if papers else operator.default_layers)
    indices = parse_layers(spec, len(description.layers), where)
    options = _parse_options(operator, {key: value for key, value in entry.items() if key in fields}, where)
    if options.factor is not None:
        return [Operation(operator, indices, options, family.name)]
    by_factor: dict[int, list[int]] = {}
    for index in indices:
        factor = (family.default_factor if papers else None) or operator.default_factor(description.layers[index])
        by_factor.setdefault(factor, []).append(index)
    return [
        Operation(operator, tuple(members), dataclasses.replace(options, factor=factor), family.name)
        for factor, members in by_factor.items()
    ]


def parse_layers(spec: Any, count: int, where: str) -> tuple[int, ...]:
    """`all`, `every:6`, `0,6,12`, a number or a list of numbers -> layer indices in ascending order.

    Raises:
        PlanError: malformed, empty, or out of the range 0 to count-1.
    """
    fix = "Use all, every:6, or a list such as 0,6,12"
    if isinstance(spec, str) and spec.strip() == "auto":
        measured = "Use --layers auto with no plan file, or the list that `statex diagnose` or statex.auto_layers gives"
        raise PlanError("layers `auto` are measured, which a plan cannot do", where=where, fix=measured)
    if isinstance(spec, str) and spec.strip() == "all":
        return tuple(range(count))
    if isinstance(spec, str) and spec.startswith("every:"):
        step = spec.removeprefix("every:").strip()
        if not step.isdecimal() or int(step) == 0:
            raise PlanError(f"layers {spec!r} has no step of 1 or more", where=where, fix=fix)
        return tuple(range(0, count, int(step)))
    items = spec.split(",") if isinstance(spec, str) else [spec] if isinstance(spec, int) else spec
    try:
        if any(isinstance(item, bool | float) for item in items):
            raise ValueError
        indices = sorted({int(item) for item in items})
    except (TypeError, ValueError):
        raise PlanError(f"layers {spec!r} is no list of layers", where=where, fix=fix) from None
    if not indices:
        raise PlanError("no layer is named", where=where, fix=fix)
    for index in indices:
        if not 0 <= index < count:
            raise PlanError(f"layer {index} is out of range", where=where, fix=f"The checkpoint has layers 0 to {count - 1}")
    return tuple(indices)


def _find_operator(name: Any, family: Family, where: str) -> Operator:
    possible = [known for known in OPERATORS if known in family.operators]
    if not isinstance(name, str) or name not in OPERATORS:
        raise PlanError(f"there is no operator {name!r}{nearest(name, OPERATORS)}", where=where, fix=f"Use {' or '.join(possible)}")
    if name not in possible:
        raise PlanError(f"{name} is not defined for the family {family.name}", where=where, fix=f"Use {' or '.join(possible)}")
    return OPERATORS[name]


def _parse_options(operator: Operator, values: Mapping[str, Any], where: str) -> Options:
    """The options dataclass, its annotations checked strictly: `true` is no factor, and 2.5 neither."""
    hints = get_type_hints(operator.options)
    for field in dataclasses.fields(operator.options):
        if field.name in values:
            try:
                TypeAdapter(hints[field.name]).validate_python(values[field.name], strict=True)
            except ValidationError as error:
                reason = "; ".join(dict.fromkeys(problem["msg"][:1].lower() + problem["msg"][1:] for problem in error.errors()))
                message = f"`{field.name}` of {operator.name} cannot be {values[field.name]!r}: {reason}"
                raise PlanError(message, where=where, fix=f"It is {field.metadata['help']}") from None
    options = operator.options(**values)
    for field in dataclasses.fields(options):
        only = field.metadata.get("only")
        if only not in (None, options.init) and getattr(options, field.name) != field.default:
            what = f"option `{field.name}` of {operator.name} has no meaning with init `{options.init}`"
            raise PlanError(what, where=where, fix=f"Drop it, or use init `{only}`")
    return options


def _require_keys(data: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    allowed = tuple(allowed)
    for key in data:
        if key not in allowed:
            raise PlanError(f"unknown key {key!r}{nearest(key, allowed)}", where=where, fix=f"Known keys: {', '.join(allowed)}")


def _refuse_repeats(operations: list[Operation], where: str) -> None:
    seen: set[tuple[str, int]] = set()
    for operation in operations:
        for index in operation.layers:
            if (operation.operator.name, index) in seen:
                what = f"layer {index} is named twice for {operation.operator.name}"
                raise PlanError(what, where=where, fix="Name it once, with the whole factor")
            seen.add((operation.operator.name, index))


def nearest(name: Any, known: Iterable[str]) -> str:
    """` (did you mean ...?)` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
