"""Building blocks of a self-contained HTML page: inline style, pictures as data, nothing fetched, nothing scripted.

Every function takes plain text and escapes it; what comes back is HTML, ready to be put together.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --quiet: #595959; --line: #c8c8c8; --mark: #fff3d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --quiet: #a8adb3; --line: #43484f; --mark: #3a3119; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 44rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .5rem 0; }
.verdict { font-size: 1.15rem; }
.scroll { overflow-x: auto; margin: 1rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
figcaption, small { color: var(--quiet); font-size: .875rem; text-align: left; }
th, td { padding: .35rem .4rem; text-align: right; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; }
td { white-space: nowrap; }
td.words { white-space: normal; min-width: 9rem; }
th:first-child { text-align: left; font-weight: inherit; }
thead th:first-child { font-weight: bold; }
th small { display: block; font-weight: normal; }
tr.mark { background: var(--mark); font-weight: bold; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; max-width: 36rem; height: auto; margin-bottom: .5rem; }
img { background: #fff; border-radius: 6px; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.35; overflow-wrap: normal; }
summary { cursor: pointer; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Cell = str | tuple[str, str]
LONG = 24  # characters: such a cell may break into lines
WORDS = '<td class="words">'


def page(title: str, *parts: str) -> str:
    """A whole document with ``title`` as its heading and HTML ``parts`` below."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what belongs under it; nothing where all ``parts`` are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{escape(style)}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, mark: int | None = None) -> str:
    """A table that scrolls sideways where it is too wide. The first cell of a row heads it.

    A cell is text, or text and a smaller second line.

    Args:
        head: Headings of the columns.
        rows: Cells, a row each.
        caption: What stands below.
        mark: The row to stand out, from 0; None for no such row.
    """
    lines = []
    for index, (name, *cells) in enumerate(rows):
        style = ' class="mark"' if index == mark else ""
        values = "".join(f"{WORDS if _wraps(cell) else '<td>'}{_cell(cell)}</td>" for cell in cells)
        lines.append(f'<tr{style}><th scope="row">{_cell(name)}</th>{values}</tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        '<figure>\n<div class="scroll" tabindex="0" role="region" aria-label="Table">\n<table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>\n"
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _wraps(cell: Cell) -> bool:
    return isinstance(cell, str) and len(cell) > LONG


def picture(png: bytes, alt: str, caption: str) -> str:
    """A figure.

    Args:
        png: The image, as the content of a PNG file.
        alt: What it shows, for who cannot see it.
        caption: How to read it.
    """
    data = base64.b64encode(png).decode()
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" alt="{escape(alt)}">\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def details(summary: str, record: Any) -> str:
    """A record as JSON, folded away."""
    text = json.dumps(record, indent=2, default=str)
    return f"<details>\n<summary>{escape(summary)}</summary>\n<pre>{escape(text)}</pre>\n</details>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(cell)
    text, small = cell
    return f"{escape(text)} <small>{escape(small)}</small>"
