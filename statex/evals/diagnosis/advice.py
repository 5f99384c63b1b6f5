"""From losses to a plan: the layers that would gain and can be expanded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...checkpoints import open_checkpoint
from ...surgery.apply import try_layers
from ...surgery.plan import resolve_plan
from ..statistics import Difference
from .findings import gaining_layers


def advise(
    checkpoint: str | Path, lost: Sequence[Difference], lost_by_all: Difference, operator: str | None, factor: int | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """A plan for the layers that would gain, and what to know about it."""
    gaining = gaining_layers(dict(enumerate(lost)))
    if not gaining:
        if not lost_by_all.shown:
            return None, ["the probe is answered as well without any long memory, so it does not show where memory is used"]
        return None, ["no layer alone is shown to lose recall when it is cut: layers stand in for each other, or rows are too few"]
    advice = [f"recall rests on the long memory of layers {', '.join(map(str, gaining))}: a larger state is of use there"]
    if len(gaining) < len(lost):
        advice.append("cutting any other layer loses less than half as much as cutting the most important one")
    with open_checkpoint(checkpoint) as files:
        able, unable = try_layers(files, gaining, operator=operator, factor=factor)
        advice.extend(f"layer {layer} is not in the plan: {error.what}" for layer, error in unable.items())
        if not able:
            return None, advice
        return resolve_plan(files, operator=operator, factor=factor, layers=list(able)).to_dict(), advice
