"""A document as one HTML file that needs nothing else: styles inside, figures as vector graphics inside, readable on paper."""

from __future__ import annotations

import base64
import io
from html import escape

from matplotlib import rc_context

from .document import Block, Code, Document, Heading, Notes, Paragraph, Picture, Table

STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --quiet: #595959; --line: #c8c8c8; --shade: #f4f4f4; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
nav ul { columns: 2; padding-left: 1.1rem; margin: .4rem 0; }
nav .level3 { margin-left: 1.1rem; }
a { color: #00507f; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0 .4rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--shade); }
th.words, td.words { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 4.5rem; }
.quiet, ul.notes { color: var(--quiet); font-size: .88rem; }
p.quiet { margin: .2rem 0 .8rem; }
ul.notes { margin: .3rem 0 1rem; padding-left: 1.2rem; }
p.strong { font-weight: 600; }
figure { margin: .8rem 0; }
figure img { max-width: 100%; height: auto; }
pre { background: var(--shade); border: 1px solid var(--line); padding: .7rem 1rem; overflow-x: auto; font-size: .85rem; }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  th, td { padding: .15rem .4rem; white-space: normal; }
}
"""


def render(document: Document) -> str:
    """The whole page."""
    body = "\n".join(_block(block, f"s{index}") for index, block in enumerate(document.blocks))
    title = escape(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{_contents(document)}{body}\n</body>\n</html>\n"
    )


def _contents(document: Document) -> str:
    sections = [(f"s{i}", block) for i, block in enumerate(document.blocks) if isinstance(block, Heading)]
    if len(sections) < 4:
        return ""
    items = "".join(f'<li class="level{block.level}"><a href="#{place}">{escape(block.text)}</a></li>' for place, block in sections)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>\n'


def _block(block: Block, place: str) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{place}">{escape(block.text)}</h{block.level}>'
    if isinstance(block, Paragraph):
        mark = ' class="strong"' if block.strong else ""
        return f"<p{mark}>{escape(block.text)}</p>"
    if isinstance(block, Notes):
        return f'<ul class="notes">{"".join(f"<li>{escape(item)}</li>" for item in block.items)}</ul>' if block.items else ""
    if isinstance(block, Code):
        return f"<pre><code>{escape(block.text)}</code></pre>"
    if isinstance(block, Picture):
        return f'<figure><img alt="{escape(block.alt)}" src="data:image/svg+xml;base64,{_svg(block)}"></figure>'
    return _table(block)


def _table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        marks = ((' class="words"' if index in table.words or index == 0 else "") for index in range(len(cells)))
        return f"<tr>{''.join(f'<{tag}{mark}>{escape(cell)}</{tag}>' for cell, mark in zip(cells, marks, strict=True))}</tr>"

    title = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    body = "".join(row(list(cells), "td") for cells in table.rows)
    below = f'<p class="quiet">{escape(table.caption)}</p>' if table.caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead>{row(list(table.head), "th")}</thead><tbody>{body}</tbody></table></div>{below}'
    )


def _svg(picture: Picture) -> str:
    """Base64 of the figure as SVG; equal figures give equal bytes."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "statex"}):
        picture.figure.savefig(file, format="svg", metadata={"Date": None})
    return base64.b64encode(file.getvalue()).decode()
