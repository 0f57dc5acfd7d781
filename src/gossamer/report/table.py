"""The survey's table in a terminal and in Markdown: baseline first, then by size, with its protocol under it.

A table that is wider than the terminal is split (memory, speed, quality) instead of cutting numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .columns import COLUMNS, FAILED, GROUPS, Column, engine_labels, method
from .protocol import notes, protocols
from .rows import Row
from .text import clean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def render_table(rows: Sequence[Row], console: Console) -> None:
    """Print the table and what must stand under it."""
    from rich.text import Text

    for columns in _pages(rows, console):
        console.print(_table(rows, columns))
        console.print()
    for line in (*notes(rows), legend()):
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)


def _pages(rows: Sequence[Row], console: Console) -> Iterator[list[Column]]:
    """The columns in as few tables as the width allows; a group of columns stays together."""
    page: list[Column] = []
    for _, group in GROUPS:
        wider = [*page, *group]
        if page and _table(rows, wider).__rich_measure__(console, console.options).maximum > console.width:
            yield page
            wider = list(group)
        page = wider
    yield page


def legend() -> str:
    """Units and abbreviations in one sentence."""
    return (
        "MB is 10^6 bytes. WM: weight memory. RM: runtime memory, peak (weights in MB + KV cache per token). "
        "KLD: KL divergence to the reference, nats per token. Top-1: agreement with the reference."
    )


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """A rich table of these columns; text is never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    engines = len(engine_labels(rows)) > 1
    for title in ("Model", "Recipe", *(("Engine",) if engines else ())):
        table.add_column(title, overflow="fold")
    for column in columns:
        table.add_column(Text(f"{column.title}\n{column.unit}"), justify="right", no_wrap=True)
    found = protocols(rows)
    for i, row in enumerate(rows):
        lead = [_name(row, found.mark(i)), Text(method(row))]
        lead += [Text(clean(row.engine or ""))] if engines else []
        table.add_row(*lead, *(_cell(column, row) for column in columns))
    return table


def _name(row: Row, mark: str) -> Text:
    """The model's name with its protocol mark; bold for the baseline."""
    from rich.text import Text

    text = Text(clean(row.label), style="bold" if row.baseline else "")
    if mark:
        text.append(f" [{mark}]", style="dim")
    if row.failed:
        text.append(" failed", style="red")
    return text


def _cell(column: Column, row: Row) -> Text:
    """A number, with the parts of runtime memory dimmed beside it."""
    from rich.text import Text

    shown = column.text(row)
    text = Text(shown, style="red" if shown == FAILED else "")
    if column.key == "rm_peak_bytes" and column.detail(row):
        text.append(f" ({column.detail(row)})", style="dim")
    return text


def to_markdown(rows: Sequence[Row]) -> str:
    """The same table and notes as plain Markdown."""
    found = protocols(rows)
    engines = len(engine_labels(rows)) > 1
    lead = ["Model", "Recipe", *(["Engine"] if engines else [])]
    head = [*lead, *(f"{column.title} {column.unit}".strip() for column in COLUMNS)]
    lines = [_line(head), _line([*("---" for _ in lead), *("---:" for _ in COLUMNS)])]
    for i, row in enumerate(rows):
        cells = [_markdown_name(row, found.mark(i)), _escape(method(row))]
        cells += [_escape(row.engine or "")] if engines else []
        lines.append(_line([*cells, *(_markdown_cell(column, row) for column in COLUMNS)]))
    return "\n".join([*lines, "", *(f"- {_escape(line)}" for line in (*notes(rows), legend()))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_name(row: Row, mark: str) -> str:
    name = f"**{_escape(row.label)}**" if row.baseline else _escape(row.label)
    return " ".join(part for part in (name, _escape(f"[{mark}]") if mark else "", FAILED if row.failed else "") if part)


def _markdown_cell(column: Column, row: Row) -> str:
    detail = column.detail(row) if column.key == "rm_peak_bytes" else ""
    return f"{column.text(row)} ({detail})" if detail else column.text(row)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new cell."""
    text = " ".join(clean(text, keep="\n\t").split())
    for char in "\\`*_[]|~":
        text = text.replace(char, "\\" + char)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
