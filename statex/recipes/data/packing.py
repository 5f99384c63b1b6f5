"""Rows of equal length from documents of any length. States reset at every document border and at every row's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import RecipeError
from ...evals.mqar_rows import IGNORE
from .sources import Fragment, Source

MAX_UNLABELLED = 1000
"""Rows in a row with nothing to predict after which the data counts as unusable."""


@dataclass(frozen=True)
class Batch:
    """What a forward pass takes.

    Attributes:
        input_ids, labels: `[B, T]`; labels are not shifted (the model does that).
        cu_seqlens: int32 `[documents + 1]`, where documents and rows start, counted over all B*T tokens; None when each row is one
            document, which needs no borders and is faster.
        labelled: positions that count in the loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor | None
    labelled: int

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's forward, on a device."""
        given = {"input_ids": self.input_ids, "labels": self.labels, "cu_seqlens": self.cu_seqlens}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in given.items() if tensor is not None}


class Packer:
    """Fills rows from weighted sources: always from the one that is furthest behind its share of the tokens.

    A document that reaches the end of its row goes on in the next one, with a fresh state. Where none fits, the row is padded.
    """

    def __init__(self, sources: Sequence[Source], sequence_length: int, pad_id: int) -> None:
        self.sources, self.sequence_length, self.pad_id = list(sources), sequence_length, pad_id
        self.used = [0] * len(self.sources)

    def batch(self, rows: int) -> Batch:
        """The next `rows` rows."""
        packed = [self.row() for _ in range(rows)]
        fragments = [fragment for row in packed for fragment in row]
        ids = torch.from_numpy(np.concatenate([fragment.ids for fragment in fragments])).view(rows, -1)
        labels = torch.from_numpy(np.concatenate([fragment.labels for fragment in fragments])).view(rows, -1)
        borders = None
        if len(fragments) > rows:
            borders = torch.tensor([0, *(len(fragment.ids) for fragment in fragments)]).cumsum(0).int()
        return Batch(ids, labels, borders, int((labels != IGNORE).sum()))

    def row(self) -> list[Fragment]:
        """Fragments that fill a row; rows without a single label teach nothing and are passed over."""
        for _ in range(MAX_UNLABELLED):
            row = self._fill()
            if any((fragment.labels != IGNORE).any() for fragment in row):
                return row
        raise RecipeError("no row of the data holds a token to predict", where="data.mixture", fix="Use longer documents or rows.")

    def state(self) -> dict[str, Any]:
        """Where the next row starts, as plain data."""
        return {"used": list(self.used), "sources": [source.state() for source in self.sources]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.used = list(state["used"])
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.load_state(source_state)

    def _fill(self) -> list[Fragment]:
        row: list[Fragment] = []
        room = self.sequence_length
        while room > 0:
            # A lone token can neither be predicted nor predict within its row.
            fragment = self._take(room) if room > 1 else None
            if fragment is None:
                fragment = Fragment(np.full(room, self.pad_id, np.int64), np.full(room, IGNORE, np.int64))
            row.append(fragment)
            room -= len(fragment.ids)
        return row

    def _take(self, room: int) -> Fragment | None:
        behind = sorted(range(len(self.sources)), key=lambda i: self.used[i] / self.sources[i].weight)
        for index in behind:
            fragment = self.sources[index].take(room)
            if fragment is not None:
                self.used[index] += len(fragment.ids)
                return fragment
        return None
