"""Blocks for a terminal: tables and words; figures are left out."""

from __future__ import annotations

from collections.abc import Iterable

from rich import table as rich_table
from rich.console import Group, RenderableType
from rich.text import Text

from .document import Block, Code, Heading, Notes, Paragraph, Table


def render(blocks: Iterable[Block]) -> Group:
    """What a rich console prints. An empty line follows each table and its notes."""
    shown: list[RenderableType] = []
    for block in blocks:
        if isinstance(block, Table):
            shown += [Text(""), _table(block)] if shown else [_table(block)]
        elif isinstance(block, Notes):
            shown += [Text(f"  {item}", style="dim") for item in block.items]
        elif isinstance(block, Paragraph | Heading):
            shown.append(Text(block.text, style="bold" if isinstance(block, Heading) or block.strong else ""))
        elif isinstance(block, Code):
            shown.append(Text(block.text))
    return Group(*shown)


def _table(table: Table) -> rich_table.Table:
    shown = rich_table.Table(title=table.title or None, title_justify="left", caption=table.caption or None, caption_justify="left")
    for index, heading in enumerate(table.head):
        shown.add_column(heading, justify="left" if index in table.words else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown
