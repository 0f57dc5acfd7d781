"""From result records to a table, a Markdown table and one HTML page.

Knows only JSON lines: no model, no engine, no measuring. What the records do not say, the report does not claim.

    load(paths) -> list[Row]            one row per model, engine and protocol, the baseline first
    render_table(rows, console)         for a terminal (rich)
    to_markdown(rows) -> str            for a README
    to_json(rows) -> str                for a program
    write_html(rows, path, title)       one self-contained page, written whole or not at all
"""

from __future__ import annotations

from .export import to_json, write_text
from .html import render_html, write_html
from .rows import Row, load
from .table import render_table, to_markdown

__all__ = ["Row", "load", "render_html", "render_table", "to_json", "to_markdown", "write_html", "write_text"]
