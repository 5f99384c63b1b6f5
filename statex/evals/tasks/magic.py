"""What needles tell (random words, numbers, UUIDs), and the plain sentences that stand in for a haystack where there is no text."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..task import Context
from ..text import encode

_NOUNS = """
anchor apron basket beacon blanket bottle branch bridge bucket button candle carpet castle chimney clover cottage cradle curtain
feather ferry forest garden hammer harbour island kettle ladder lantern marble meadow mirror needle orchard paddle parcel pebble
pillow pocket prairie quarry ribbon saddle shelter shovel spindle stable thimble tunnel valley walnut whistle window
"""
NOUNS = _NOUNS.split()
"""What the values belong to, and the nouns of the generated filler."""
_ADJECTIVES = "bright broken cold distant gentle heavy hidden narrow old quiet red small tall wide"
ADJECTIVES = _ADJECTIVES.split()
VERBS = ("faces", "follows", "guards", "hides", "holds", "joins", "keeps", "leaves", "marks", "meets", "needs", "shows", "touches")
PLACES = ("above the hill", "after the rain", "at dawn", "by the river", "in the north", "near the road", "on a clear day")


@dataclass(frozen=True)
class Values:
    """A kind of value: its plural, for the sentence, and how one is drawn (with the space before it)."""

    plural: str
    draw: Callable[[np.random.Generator], str]


def draw_uuid(rng: np.random.Generator) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


NUMBERS = Values("numbers", lambda rng: f" {rng.integers(1_000_000, 10_000_000)}")
WORDS = Values("words", lambda rng: f" {rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.choice(NOUNS)}")
UUIDS = Values("uuids", lambda rng: f" {draw_uuid(rng)}")
VALUES = (NUMBERS, WORDS, UUIDS)


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
    first, second = rng.choice(NOUNS, 2)
    adjectives, verb, place = rng.choice(ADJECTIVES, 2), rng.choice(VERBS), rng.choice(PLACES)
    return f" The {adjectives[0]} {first} {verb} the {adjectives[1]} {second} {place}."
