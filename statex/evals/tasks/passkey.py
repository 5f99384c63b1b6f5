"""Passkey retrieval: a five-digit key in repeated filler sentences (arXiv 2305.16300)."""

from __future__ import annotations

import numpy as np

from ..task import Context, Schedule
from ..text import encode
from .needle import Needle, needle_schedule

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Passkey:
    """Find a five-digit key that is told once in a text of no content."""

    name = "passkey"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        filler = encode(context.tokenizer, FILLER)

        def draw_hay(length: int, rng: np.random.Generator) -> np.ndarray:
            return np.resize(filler, length)

        return needle_schedule(self.name, context, draw_passkey, draw_hay, notes=())


def draw_passkey(rng: np.random.Generator) -> Needle:
    """The needle with its key, 10000 to 99999."""
    value = f" {rng.integers(10_000, 100_000)}"
    return Needle(" The pass key is", value, f". Remember it:{value} is the pass key.", " What is the pass key? The pass key is")
