"""Single needle in a haystack of real text, in the form of RULER (arXiv 2404.06654)."""

from __future__ import annotations

import numpy as np

from ..task import Context, Schedule
from ..text import encode
from .needle import Needle, needle_schedule

_NOUNS = """
anchor apron basket beacon blanket bottle branch bridge bucket button candle carpet castle chimney clover cottage cradle curtain
feather ferry forest garden hammer harbour island kettle ladder lantern marble meadow mirror needle orchard paddle parcel pebble
pillow pocket prairie quarry ribbon saddle shelter shovel spindle stable thimble tunnel valley walnut whistle window
"""
WORDS = _NOUNS.split()
"""What the numbers belong to, and the nouns of the generated filler."""
ADJECTIVES = (
    "bright",
    "broken",
    "cold",
    "distant",
    "gentle",
    "heavy",
    "hidden",
    "narrow",
    "old",
    "quiet",
    "red",
    "small",
    "tall",
    "wide",
)
VERBS = ("faces", "follows", "guards", "hides", "holds", "joins", "keeps", "leaves", "marks", "meets", "needs", "shows", "touches")
PLACES = ("above the hill", "after the rain", "at dawn", "by the river", "in the north", "near the road", "on a clear day")


class NeedleInAHaystack:
    """Find the number of one word in book text."""

    name = "niah"
    needs_data = False

    def schedule(self, context: Context) -> Schedule:
        if context.documents:
            return needle_schedule(self.name, context, draw_number, context.haystack.draw, [f"haystack: {context.source}"])

        def draw_hay(length: int, rng: np.random.Generator) -> np.ndarray:
            return generated_filler(context, length, rng)

        note = "haystack: generated sentences, since no data were given; easier than real text"
        return needle_schedule(self.name, context, draw_number, draw_hay, [note])


def draw_number(rng: np.random.Generator) -> Needle:
    """A needle with a seven-digit number for a word."""
    word, value = rng.choice(WORDS), f" {rng.integers(1_000_000, 10_000_000)}"
    return Needle(
        f" One of the special magic numbers for {word} is:",
        value,
        ".",
        f" What is the special magic number for {word} mentioned in the text? One of the special magic numbers for {word} is:",
    )


def generated_filler(context: Context, length: int, rng: np.random.Generator) -> np.ndarray:
    """Token ids `[length]` of random plain sentences."""
    pieces: list[np.ndarray] = []
    missing = length
    while missing > 0:
        # A sentence is at least ten tokens in hardly any vocabulary: a few passes reach the length.
        piece = encode(context.tokenizer, "".join(_sentence(rng) for _ in range(missing // 16 + 1)))
        pieces.append(piece)
        missing -= len(piece)
    return np.concatenate(pieces)[:length]


def _sentence(rng: np.random.Generator) -> str:
    first, second = rng.choice(WORDS, 2)
    adjectives, verb, place = rng.choice(ADJECTIVES, 2), rng.choice(VERBS), rng.choice(PLACES)
    return f" The {adjectives[0]} {first} {verb} the {adjectives[1]} {second} {place}."
