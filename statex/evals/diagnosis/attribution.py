"""Recall attribution: how much recall is lost when the long memory of a layer, or of a head, is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...families.description import ModelDescription
from ...models.components import Mixer
from ...models.modeling import StatexBlock
from ..statistics import Difference, holm
from ..subject import Subject
from .cutting import HeadCuts, cut_layer, cut_layers, head_channels, output_projection
from .probes import Recalled

Advance = Callable[[str], None]
"""Told what is being done."""


def attribute_layers(
    recalled: Recalled, subject: Subject, mixers: list[Mixer], window: int, advance: Advance = lambda what: None
) -> tuple[Difference, list[Difference]]:
    """Recall lost when the long memory of all layers is cut, and of each layer alone (Holm-corrected over the layers)."""
    with cut_layers(mixers, window):
        all_cut = recalled.lost_by(recalled.probe.right(subject))
    losses = []
    for index, mixer in enumerate(mixers):
        advance(f"cutting layer {index} of {len(mixers)}")
        with cut_layer(mixer, window):
            losses.append(recalled.lost_by(recalled.probe.right(subject)))
    return all_cut, _corrected(losses)


def attribute_heads(
    recalled: Recalled,
    subject: Subject,
    model: ModelDescription,
    window: int,
    lost: Sequence[Difference],
    advance: Advance = lambda what: None,
) -> dict[int, list[Difference]]:
    """Recall lost when one head's long memory is cut, for layers whose cut is shown to lose some and that have several heads.

    Where a norm runs over several heads, the other heads keep the whole layer's.
    """
    losses: dict[int, list[Difference]] = {}
    blocks = [module for module in subject.model.modules() if isinstance(module, StatexBlock)]
    for index, block in enumerate(blocks):
        projection = output_projection(block.mixer, model.hidden_size)
        channels = head_channels(model.layers[index], projection)
        if not lost[index].shown or len(channels) < 2:
            continue
        losses[index], cuts = [], HeadCuts(blocks, index, projection, window)
        with cuts.recording():
            recalled.probe.right(subject)
        for head, part in enumerate(channels):
            advance(f"cutting head {head} of {len(channels)} in layer {index}")
            with cuts.cut(part):
                losses[index].append(recalled.lost_by(recalled.probe.right(subject)))
    corrected = iter(_corrected([loss for heads in losses.values() for loss in heads]))
    return {index: [next(corrected) for _ in heads] for index, heads in losses.items()}


def mixers_of(subject: Subject) -> list[Mixer]:
    """The mixers of a model of ours, in the order of its layers."""
    return [module for module in subject.model.modules() if isinstance(module, Mixer)]


def _corrected(losses: list[Difference]) -> list[Difference]:
    if len(losses) < 2:
        return losses
    adjusted = holm([loss.p for loss in losses])
    return [replace(loss, adjusted=p) for loss, p in zip(losses, adjusted, strict=True)]
