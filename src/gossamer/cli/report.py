"""`gossamer report`: result files to a table on stdout, and to an HTML page or a Markdown file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._options import Json, Quiet


def report(
    paths: Annotated[list[Path], typer.Argument(help="Result files (.jsonl), or folders searched for them.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page.", metavar="FILE")] = None,
    as_json: Json = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.", metavar="FILE")] = None,
    quiet: Quiet = False,
    title: Annotated[str, typer.Option(help="Title of the HTML page.")] = "Gossamer report",
) -> None:
    """One table of what was measured: memory, speed and quality, with the protocol under it.

    \b
    gossamer report runs/ --html report.html
    """
    import sys

    from gossamer import report as reporting

    rows = reporting.load(paths)
    if as_json:
        sys.stdout.write(reporting.to_json(rows) + "\n")
    else:
        from rich.console import Console

        # Piped output is read by programs: never wrapped to a terminal that is not there.
        console = Console(file=sys.stdout)
        reporting.render_table(rows, console if console.is_terminal else Console(file=sys.stdout, width=10_000))
    if markdown is not None:
        reporting.write_text(markdown, reporting.to_markdown(rows))
    if html is not None:
        reporting.write_html(rows, html, title)
    if not quiet:
        for path in (markdown, html):
            if path is not None:
                sys.stderr.write(f"wrote {path} ({_size(path.stat().st_size)})\n")


def _size(count: int) -> str:
    """Bytes in the unit that leaves digits to see."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
