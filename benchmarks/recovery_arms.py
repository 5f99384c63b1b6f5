"""The arms of `recovery.py`: what is done to a base, and how it is trained on. A line each, in order of priority.

Rates were chosen around the rate that the bases were trained at, 3e-3. `new`, `expanded`, `rows` and `rest` are the recipe's
multipliers of parameters that surgery added, of those that it enlarged or drew afresh, of rows that it appended to these, and of
all others.

Two ideas have no line. Reading foreign blocks through a rotation of their keys: a block has one set of keys for all its readers, so
that rotating keys and queries alike cancels, and one of them alone only scrambles; keys of their own for new rows are what
`widen_state` gives. Needles are beyond these bases, and key-value text beyond those that never read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

GLA, MAMBA2 = "gla", "mamba2"
AUTO = "auto"
"""Layers that recall attribution names on the base at hand."""


@dataclass(frozen=True)
class Arm:
    """One way to go on from a base.

    Attributes:
        name: what the CSV calls it.
        family: of the bases that it is for.
        axis: the question that it belongs to.
        plan: the surgery's operations; none: no surgery.
        rate: highest learning rate. new, expanded, rows, rest: the recipe's multipliers.
        extra: keys of `recovery_extras.EXTRAS`, with commas, each with its number behind a colon.
        scratch: only the shapes of the surgery's result are kept, and the model is trained from nothing on the tokens of base and
            recovery together. Such an arm runs when it is named.
        given: nothing is trained; the checkpoint that `--oracle` names is measured, and told with the tokens behind it. Likewise.
    """

    name: str
    family: str
    axis: str
    plan: tuple[dict[str, Any], ...] = ()
    rate: float = 1e-3
    new: float = 10.0
    expanded: float = 1.0
    rows: float = 1.0
    rest: float = 1.0
    extra: str = ""
    scratch: bool = False
    given: bool = False


def lift(factor: int, init: str = "preserve", layers: Any = "all") -> tuple[dict[str, Any], ...]:
    """Keys lifted."""
    return ({"operator": "lift_keys", "factor": factor, "init": init, "layers": layers},)


def widen(factor: int, init: str = "preserve", layers: Any = "all", **options: Any) -> tuple[dict[str, Any], ...]:
    """Keys of more channels, from projections of more rows."""
    return ({"operator": "widen_state", "factor": factor, "init": init, "layers": layers, **options},)


def merge(init: str = "preserve", layers: Any = "all", **options: Any) -> tuple[dict[str, Any], ...]:
    """All heads of a layer merged into one."""
    return ({"operator": "merge_heads", "init": init, "layers": layers, **options},)


SCALAR = {"mixing": "scalar"}

ARMS: tuple[Arm, ...] = (
    # The floor, and the main arms beside it.
    Arm("lpt@1e-3", GLA, "baseline"),
    Arm("lpt@1e-3", MAMBA2, "baseline"),
    Arm("lift4", GLA, "operator", lift(4)),
    Arm("widen4", GLA, "operator", widen(4)),
    Arm("widen4", MAMBA2, "operator", widen(4)),
    Arm("merge-reinit", GLA, "operator", merge("reinit")),
    Arm("merge", GLA, "operator", merge()),
    Arm("lift4", MAMBA2, "operator", lift(4)),
    Arm("widen4-reinit", MAMBA2, "operator", widen(4, "reinit")),
    Arm("lpt@3e-3", GLA, "baseline", rate=3e-3),
    Arm("lpt@3e-4", GLA, "baseline", rate=3e-4),
    Arm("lift4@3e-3", GLA, "rate", lift(4), rate=3e-3),
    Arm("lift4@3e-4", GLA, "rate", lift(4), rate=3e-4, new=30.0),
    Arm("widen4@3e-3", GLA, "rate", widen(4), rate=3e-3),
    Arm("widen4@3e-4", GLA, "rate", widen(4), rate=3e-4),
    Arm("merge-reinit@3e-3", GLA, "rate", merge("reinit"), rate=3e-3),
    Arm("merge@3e-3", GLA, "rate", merge(), rate=3e-3),
    Arm("widen4-reinit", GLA, "operator", widen(4, "reinit")),
    Arm("widen4-reinit@3e-3", GLA, "rate", widen(4, "reinit"), rate=3e-3),
    Arm("widen4-inherit", GLA, "operator", widen(4, "inherit")),
    Arm("merge-inherit", GLA, "operator", merge("inherit")),
    Arm("lift4-inherit", GLA, "operator", lift(4, "inherit")),
    Arm("lpt@3e-3", MAMBA2, "baseline", rate=3e-3),
    Arm("lpt@3e-4", MAMBA2, "baseline", rate=3e-4),
    Arm("widen4@3e-3", MAMBA2, "rate", widen(4), rate=3e-3),
    Arm("widen4@3e-4", MAMBA2, "rate", widen(4), rate=3e-4),
    Arm("widen4-reinit@3e-3", MAMBA2, "rate", widen(4, "reinit"), rate=3e-3),
    Arm("widen4-inherit", MAMBA2, "operator", widen(4, "inherit")),
    Arm("widen4-control", MAMBA2, "control", widen(4), extra="sum_of_sets:4"),
    # How fast new numbers move.
    Arm("lift4-new30", GLA, "multiplier", lift(4), new=30.0),
    Arm("lift4-new100", GLA, "multiplier", lift(4), new=100.0),
    Arm("lift4-new1", GLA, "multiplier", lift(4), new=1.0),
    Arm("merge-new100", GLA, "multiplier", merge(), new=100.0),
    Arm("merge-new30", GLA, "multiplier", merge(), new=30.0),
    Arm("merge-new1", GLA, "multiplier", merge(), new=1.0),
    Arm("widen4-expanded3", GLA, "multiplier", widen(4), expanded=3.0),
    Arm("widen4-expanded10", GLA, "multiplier", widen(4), expanded=10.0),
    Arm("widen4-expanded0.3", GLA, "multiplier", widen(4), expanded=0.3),
    Arm("widen4-expanded0.3", MAMBA2, "multiplier", widen(4), expanded=0.3),
    Arm("widen4-expanded3", MAMBA2, "multiplier", widen(4), expanded=3.0),
    Arm("widen4-expanded10", MAMBA2, "multiplier", widen(4), expanded=10.0),
    Arm("lift4@3e-4-new100", GLA, "multiplier", lift(4), rate=3e-4, new=100.0),
    Arm("widen4@3e-4-expanded3", GLA, "multiplier", widen(4), rate=3e-4, expanded=3.0),
    Arm("widen4@3e-4-expanded10", GLA, "multiplier", widen(4), rate=3e-4, expanded=10.0),
    Arm("widen4@3e-4-rows10", GLA, "multiplier", widen(4), rate=3e-4, rows=10.0),
    Arm("widen4@3e-4-rows30", GLA, "multiplier", widen(4), rate=3e-4, rows=30.0),
    Arm("widen4@1e-3-rows10", GLA, "multiplier", widen(4), rows=10.0),
    Arm("widen8@1e-3-rows10", GLA, "factor", widen(8), rows=10.0),
    Arm("widen8@3e-4-rows10", GLA, "factor", widen(8), rate=3e-4, rows=10.0),
    Arm("widen2+lift2@3e-4-new100-rows10", GLA, "factor", widen(2) + lift(2), rate=3e-4, new=100.0, rows=10.0),
    Arm("lift4@3e-4-new100", MAMBA2, "multiplier", lift(4), rate=3e-4, new=100.0),
    Arm("widen4@3e-4-rows10", MAMBA2, "multiplier", widen(4), rate=3e-4, rows=10.0),
    Arm("widen4@1e-3-rows10", MAMBA2, "multiplier", widen(4), rows=10.0),
    Arm("widen4@3e-4-rows30", MAMBA2, "multiplier", widen(4), rate=3e-4, rows=30.0),
    Arm("widen4-recombined@3e-4-rows10", MAMBA2, "opening", widen(4), rate=3e-4, rows=10.0, extra="recombined"),
    Arm("widen8@3e-4-rows10", MAMBA2, "factor", widen(8), rate=3e-4, rows=10.0),
    Arm("widen4-control@3e-4-rows10", MAMBA2, "control", widen(4), rate=3e-4, rows=10.0, extra="sum_of_sets:4"),
    Arm("widen2+lift2@3e-4-new100-rows10", MAMBA2, "factor", widen(2) + lift(2), rate=3e-4, new=100.0, rows=10.0),
    Arm("widen4+lift2@3e-4-new100-rows10", MAMBA2, "factor", widen(4) + lift(2), rate=3e-4, new=100.0, rows=10.0),
    # How much state.
    Arm("lift2", GLA, "factor", lift(2)),
    Arm("lift3", GLA, "factor", lift(3)),
    Arm("widen2", GLA, "factor", widen(2)),
    Arm("widen8", GLA, "factor", widen(8)),
    Arm("widen2+lift2", GLA, "factor", widen(2) + lift(2)),
    Arm("merge+lift2", GLA, "factor", merge() + lift(2)),
    Arm("widen2", MAMBA2, "factor", widen(2)),
    Arm("widen8", MAMBA2, "factor", widen(8)),
    Arm("lift2", MAMBA2, "factor", lift(2)),
    Arm("widen2+lift2", MAMBA2, "factor", widen(2) + lift(2)),
    # Which layers.
    Arm("lift4-auto", GLA, "layers", lift(4, layers=AUTO)),
    Arm("widen4-auto", GLA, "layers", widen(4, layers=AUTO)),
    Arm("lift4-every2", GLA, "layers", lift(4, layers="every:2")),
    Arm("merge-reinit-auto", GLA, "layers", merge("reinit", AUTO)),
    Arm("merge-reinit-every2", GLA, "layers", merge("reinit", "every:2")),
    Arm("widen4-auto", MAMBA2, "layers", widen(4, layers=AUTO)),
    Arm("lift4-layer0", GLA, "layers", lift(4, layers=[0])),
    Arm("lift4-layer1", GLA, "layers", lift(4, layers=[1])),
    Arm("lift4-layer2", GLA, "layers", lift(4, layers=[2])),
    Arm("lift4-layer3", GLA, "layers", lift(4, layers=[3])),
    # How new numbers begin.
    Arm("merge-scalar", GLA, "opening", merge(**SCALAR)),
    Arm("merge-scalar-new100", GLA, "multiplier", merge(**SCALAR), new=100.0),
    Arm("merge-noise0.1", GLA, "opening", merge(), extra="noise:0.1"),
    Arm("merge-noise0.3", GLA, "opening", merge(), extra="noise:0.3"),
    Arm("merge-scheduled", GLA, "opening", merge(), extra="scheduled"),
    Arm("merge-annealed", GLA, "opening", merge(**SCALAR), extra="annealed"),
    Arm("lift4-noise0.1", GLA, "opening", lift(4), extra="noise:0.1"),
    Arm("widen4-zeroB", GLA, "opening", widen(4, zero="B")),
    Arm("widen4-orthogonal", GLA, "opening", widen(4), extra="orthogonal"),
    Arm("widen4-zeroB", MAMBA2, "opening", widen(4, zero="B")),
    Arm("widen4-orthogonal", MAMBA2, "opening", widen(4), extra="orthogonal"),
    Arm("widen4-reinit-decay", MAMBA2, "opening", widen(4, "reinit", reinit_decay=True)),
    # What else the loss says, and what is trained.
    Arm("lift4-distilled", GLA, "distillation", lift(4), extra="distilled:0.5"),
    Arm("widen4-distilled", GLA, "distillation", widen(4), extra="distilled:0.5"),
    Arm("merge-reinit-distilled", GLA, "distillation", merge("reinit"), extra="distilled:0.5"),
    Arm("lift4-new-only", GLA, "frozen", lift(4), rest=0.0),
    Arm("widen4-enlarged-only", GLA, "frozen", widen(4), rest=0.0),
    # The rest of the grids.
    Arm("lpt@1e-4", GLA, "baseline", rate=1e-4),
    Arm("lpt@1e-4", MAMBA2, "baseline", rate=1e-4),
    Arm("lift4@3e-3", MAMBA2, "rate", lift(4), rate=3e-3),
    Arm("lift4-new30", MAMBA2, "multiplier", lift(4), new=30.0),
    Arm("lift4-new100", MAMBA2, "multiplier", lift(4), new=100.0),
    Arm("widen4-every2", MAMBA2, "layers", widen(4, layers="every:2")),
    Arm("merge@3e-4", GLA, "rate", merge(), rate=3e-4, new=30.0),
    Arm("merge-reinit@3e-4", GLA, "rate", merge("reinit"), rate=3e-4),
    Arm("merge-scalar-new1", GLA, "multiplier", merge(**SCALAR), new=1.0),
    Arm("merge-scalar-new30", GLA, "multiplier", merge(**SCALAR), new=30.0),
    Arm("lift4-reinit", GLA, "operator", lift(4, "reinit")),
    # The ceiling.
    Arm("oracle-widen4", GLA, "ceiling", widen(4, "reinit"), rate=3e-3, scratch=True),
    Arm("oracle-widen4", MAMBA2, "ceiling", widen(4, "reinit"), rate=3e-3, scratch=True),
    Arm("oracle-lift4", GLA, "ceiling", lift(4), rate=3e-3, new=1.0, scratch=True),
    Arm("oracle-merged", GLA, "ceiling", merge("reinit"), rate=3e-3, scratch=True),
    Arm("oracle-lift4", MAMBA2, "ceiling", lift(4), rate=3e-3, new=1.0, scratch=True),
    Arm("oracle", GLA, "ceiling", given=True),
    Arm("oracle", MAMBA2, "ceiling", given=True),
)


def choose(patterns: Iterable[str]) -> list[Arm]:
    """Arms whose name or axis matches one of the patterns, by pattern; without any, all but oracles."""
    patterns = list(patterns)
    if not patterns:
        return [arm for arm in ARMS if not (arm.scratch or arm.given)]
    found: dict[tuple[str, str], Arm] = {}
    for pattern in patterns:
        matching = [arm for arm in ARMS if fnmatchcase(arm.name, pattern) or arm.axis == pattern]
        if not matching:
            raise SystemExit(f"no arm and no axis is called {pattern}; see benchmarks/recovery_arms.py")
        for arm in matching:
            found.setdefault((arm.family, arm.name), arm)
    return list(found.values())


def find(family: str, name: str) -> Arm:
    """One arm."""
    return next(arm for arm in ARMS if (arm.family, arm.name) == (family, name))
