"""Options of the drivers that are lists, separated by commas; argparse tells what is wrong with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole_numbers(text: str) -> list[int]:
    """`1,2` -> `[1, 2]`; nothing -> `[]`."""
    return [int(part) for part in text.split(",") if part]


def some_of(*known: str) -> Callable[[str], list[str]]:
    """A type of option: some of these words."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}, separated by commas")
        return names

    return parse
