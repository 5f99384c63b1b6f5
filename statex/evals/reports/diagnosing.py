"""What a diagnosis says."""

from __future__ import annotations

import math
import statistics

import yaml

from ..diagnosis import Diagnosis, LayerFinding
from ..report import change_text, p_text
from ..statistics import Difference
from .document import Block, Code, Document, Heading, Notes, Paragraph, Picture, Table
from .evaluating import plan_blocks, provenance_table


def diagnosis_document(diagnosis: Diagnosis) -> Document:
    """Advice and plan, recall attribution, states, gates, provenance."""
    from ..diagnosis.plots import diagnosis_figures

    pictures: list[Block] = [
        Picture(figure, name, f"{name.replace('_', ' ')} of {diagnosis.name}; the tables have the numbers")
        for name, figure in diagnosis_figures(diagnosis).items()
    ]
    found = finding_blocks(diagnosis)
    first = next(index for index, block in enumerate(found) if isinstance(block, Table))
    blocks: list[Block] = [Heading("Findings"), *found[:first], *pictures, *found[first:]]
    if diagnosis.plan is not None:
        blocks += [Heading("Suggested plan"), plan_code(diagnosis.plan), Notes(["for statex expand --plan"])]
    blocks += [*plan_blocks(diagnosis.name, diagnosis.checkpoint), Heading("Provenance"), provenance_table(diagnosis)]
    return Document(f"Diagnosis of {diagnosis.name}", blocks)


def plan_code(plan: object) -> Code:
    """A plan as it stands in a file."""
    return Code(yaml.safe_dump(plan, sort_keys=False, default_flow_style=None, width=110))


def finding_blocks(diagnosis: Diagnosis) -> list[Block]:
    """Everything that was found, in tables."""
    window = diagnosis.settings["window"]
    blocks: list[Block] = [
        Paragraph(
            f"{diagnosis.name}: recall {diagnosis.recall:.3f} ({diagnosis.probe}; {diagnosis.rows} rows). With the long memory of "
            f"all layers cut {diagnosis.recall_without:.3f}, {_lost(diagnosis.lost_by_all)} less."
        ),
        *(
            Paragraph(f"{sentence[:1].upper()}{sentence[1:]}.", strong=index == 0)
            for index, sentence in enumerate(diagnosis.advice)
        ),
        _layers(diagnosis),
        Notes(
            [
                f"recall lost: a layer that sees {window} to {2 * window - 1} tokens back instead of all, the others whole; "
                "paired over the same rows, p corrected by Holm's method",
                "effective rank: exp of the entropy of the normalised singular values; occupied: directions that hold 99 % of "
                "the energy, of those that there can be; half-life: tokens of text until half of a state's norm is left; medians "
                "over texts and heads, and the range over heads",
            ]
        ),
    ]
    heads = [[str(one.layer), str(head), *_loss_cells(loss)] for one in diagnosis.layers for head, loss in enumerate(one.heads)]
    if heads:
        notes = ["only heads of layers that lose recall when cut; a merged head counts as its source heads"]
        blocks += [Table(["layer", "head", "recall lost", "p"], heads, title="recall lost by head"), Notes(notes)]
    opened = [
        [str(one.layer), each.tensor, each.role, f"{each.numbers:,}", f"{each.rms:.3g}", f"{each.largest:.3g}"]
        for one in diagnosis.layers
        for each in one.opened
    ]
    if opened:
        head = ["layer", "tensor", "role", "numbers", "RMS", "largest"]
        caption = "distance from the value at which the layer computes what it did before surgery"
        blocks.append(Table(head, opened, title="how far surgery's numbers have opened", caption=caption, words=frozenset({1, 2})))
    return blocks


def _layers(diagnosis: Diagnosis) -> Table:
    gaining = diagnosis.gaining_layers
    rows = [
        [str(one.layer), one.state, *_loss_cells(one.lost), *_memory(one), "yes" if one.layer in gaining else "no"]
        for one in diagnosis.layers
    ]
    head = ["layer", "state", "recall lost", "p", "effective rank", "occupied", "half-life", "would gain"]
    return Table(head, rows, title="layers")


def _loss_cells(loss: Difference) -> list[str]:
    p = loss.p if loss.adjusted is None else loss.adjusted
    return [_lost(loss), p_text(p) + ("" if loss.shown else ", no difference shown")]


def _lost(loss: Difference) -> str:
    return change_text(loss, 3).replace("+", "")


def _memory(finding: LayerFinding) -> list[str]:
    memory = finding.memory
    if memory is None:
        return ["", "", ""]
    if not memory.effective_rank:
        rank = ["a vector", ""]
    else:
        rank = [
            f"{_spread(memory.effective_rank, '.1f')} of {memory.rank_limit}",
            _spread([100 * share for share in memory.occupied], ".0f") + " %",
        ]
    middle, low, high = statistics.median(memory.half_life), min(memory.half_life), max(memory.half_life)
    tokens = [f"> {memory.horizon}" if math.isinf(x) else f"{x:.3g}" for x in (middle, low, high)]
    return [*rank, tokens[0] if len(memory.half_life) == 1 else f"{tokens[0]} ({tokens[1]} to {tokens[2]})"]


def _spread(values: list[float], form: str) -> str:
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"
