"""Writes docs/reference.md from the commands' own --help. A test compares the two.

python docs/make_reference.py
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

TARGET = Path(__file__).with_name("reference.md")


def reference() -> str:
    """The whole page."""
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    from gossamer.cli import main
    from gossamer.cli._app import app

    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    parts = ["# Commands\n\nMade by `python docs/make_reference.py` from `--help`; edit the code, not this page.\n"]
    for words in ([], *([name] for name in names)):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            main([*words, "--help"])
        body = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
        parts.append(f"## {' '.join(['gossamer', *words])}\n\n```text\n{body}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(reference())
