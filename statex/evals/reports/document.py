"""A report as data: headings, tables, figures. Written once, shown on a terminal, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    """A section's title; level 2 for sections, 3 below them."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """One paragraph; `strong` for what a hurried reader must see."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Notes:
    """Short remarks below a table or a figure."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the row; the others are numbers and stand to the right unless `words` has their
    index."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    words: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A figure with the name of its PNG (without ending) and a text for those who do not see it."""

    figure: Figure
    name: str
    alt: str


@dataclass(frozen=True)
class Code:
    """Text as it is, such as a plan in YAML."""

    text: str
    language: str = "yaml"


Block = Heading | Paragraph | Notes | Table | Picture | Code


@dataclass(frozen=True)
class Document:
    """A title and what follows."""

    title: str
    blocks: Sequence[Block]

    @property
    def pictures(self) -> list[Picture]:
        """All figures, in order."""
        return [block for block in self.blocks if isinstance(block, Picture)]
