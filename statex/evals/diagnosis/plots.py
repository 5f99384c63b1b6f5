"""Figures of a diagnosis: recall lost by layer, by head, and how full and how lasting states are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..plots import COLOURS, beside_axis, draw_heat, new_figure
from .findings import Diagnosis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def diagnosis_figures(diagnosis: Diagnosis) -> dict[str, Figure]:
    """Figures by file name."""
    figures = {"recall_lost_by_layer": _by_layer(diagnosis)}
    if any(finding.heads for finding in diagnosis.layers):
        figures["recall_lost_by_head"] = _by_head(diagnosis)
    if any(finding.memory is not None for finding in diagnosis.layers):
        figures["half_life_by_layer"] = _half_lives(diagnosis)
    return figures


def _by_layer(diagnosis: Diagnosis) -> Figure:
    layers = [finding.layer for finding in diagnosis.layers]
    lost = [finding.lost for finding in diagnosis.layers]
    value = np.array([loss.value for loss in lost])
    errors = np.maximum([value - [loss.low for loss in lost], [loss.high for loss in lost] - value], 0)
    figure, axes = new_figure(width=max(5.6, 1.8 + 0.3 * len(layers)), height=3.4)
    gaining = diagnosis.gaining_layers
    for chosen, label, colour, hatch in ((True, "would gain", COLOURS[0], ""), (False, "would not", "0.8", "///")):
        members = [index for index, layer in enumerate(layers) if (layer in gaining) == chosen]
        if members:
            axes.bar(
                [layers[i] for i in members],
                value[members],
                yerr=errors[:, members],
                capsize=3,
                error_kw={"elinewidth": 1},
                color=colour,
                edgecolor="black",
                linewidth=0.6,
                hatch=hatch,
                label=label,
            )
    axes.axhline(diagnosis.recall, color="0.45", linewidth=0.9, linestyle=(0, (4, 2)))
    beside_axis(axes, "recall of the whole model", diagnosis.recall, right=True)
    axes.set_ylim(
        min(0, float((value - errors[0]).min())) - 0.02, max(1.12 * diagnosis.recall, float((value + errors[1]).max())) + 0.02
    )
    axes.set_xticks(layers if len(layers) <= 32 else layers[::4])
    axes.set_xlabel("layer whose long memory is cut")
    axes.set_ylabel("recall lost")
    axes.set_title(f"{diagnosis.probe} · {diagnosis.name} (95 % intervals)", fontsize=10)
    axes.grid(True, axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _by_head(diagnosis: Diagnosis) -> Figure:
    found = [finding for finding in diagnosis.layers if finding.heads]
    heads = max(len(finding.heads) for finding in found)
    grid = np.full((len(found), heads), np.nan)
    for row, finding in enumerate(found):
        grid[row, : len(finding.heads)] = [loss.value for loss in finding.heads]
    figure, axes = new_figure(width=max(5.6, 2.4 + 0.5 * heads), height=1.7 + 0.42 * len(found))
    texts = [f"{value:.2f}".replace("-0.00", "0.00") if heads <= 24 else "" for value in grid.ravel()]
    draw_heat(axes, grid, texts, label="recall lost", low=min(0.0, float(np.nanmin(grid))), high=max(0.05, float(np.nanmax(grid))))
    axes.set_yticks(range(len(found)), [str(finding.layer) for finding in found])
    axes.set_xticks(range(0, heads, max(1, heads // 16)))
    axes.set_xlabel("head whose long memory is cut")
    axes.set_ylabel("layer")
    axes.set_title(f"{diagnosis.probe} · {diagnosis.name}", fontsize=10)
    return figure


def _half_lives(diagnosis: Diagnosis) -> Figure:
    """Each head a dot; those beyond the horizon lie on its line."""
    figure, axes = new_figure(width=max(5.6, 1.8 + 0.3 * len(diagnosis.layers)), height=3.4)
    horizon = 1
    for finding in diagnosis.layers:
        if finding.memory is not None:
            horizon = finding.memory.horizon
            tokens = np.minimum(finding.memory.half_life, horizon)
            spread = np.linspace(-0.25, 0.25, len(tokens)) if len(tokens) > 1 else np.zeros(1)
            axes.plot(
                finding.layer + spread, tokens, "o", color=COLOURS[0], markersize=4, markeredgecolor="black", markeredgewidth=0.4
            )
    axes.axhline(horizon, color="0.45", linewidth=0.9, linestyle=(0, (4, 2)))
    beside_axis(axes, f"{horizon} tokens or more", 1.12 * horizon)
    axes.set_yscale("log", base=2)
    axes.set_ylim(top=horizon * 2)
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    layers = [finding.layer for finding in diagnosis.layers]
    axes.set_xticks(layers if len(layers) <= 32 else layers[::4])
    axes.set_xlabel("layer (a dot a head)")
    axes.set_ylabel("half-life of what is stored (tokens)")
    axes.set_title(f"decay on real text · {diagnosis.name}", fontsize=10)
    axes.grid(True, axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure
