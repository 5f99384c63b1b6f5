"""A document as Markdown, with its figures as PNG files beside it."""

from __future__ import annotations

from .document import Block, Code, Document, Heading, Notes, Paragraph, Picture, Table


def render(document: Document) -> str:
    """The whole file."""
    return "\n\n".join([f"# {document.title}", *filter(None, map(render_block, document.blocks))]) + "\n"


def render_block(block: Block) -> str:
    """One block, without empty lines around it."""
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return f"**{block.text}**" if block.strong else block.text
    if isinstance(block, Notes):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Code):
        return f"```{block.language}\n{block.text.rstrip()}\n```"
    if isinstance(block, Picture):
        return f"![{block.alt}]({block.name}.png)"
    return _table(block)


def _table(table: Table) -> str:
    rules = [":---" if index in table.words or index == 0 else "---:" for index in range(len(table.head))]
    lines = [_row(table.head), _row(rules), *map(_row, table.rows)]
    title = f"**{table.title}**\n\n" if table.title else ""
    below = f"\n\n*{table.caption}*" if table.caption else ""
    return title + "\n".join(lines) + below


def _row(cells: object) -> str:
    assert isinstance(cells, list | tuple)
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
