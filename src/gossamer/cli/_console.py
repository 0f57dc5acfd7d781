"""How every command talks: data on stdout, everything else on stderr. Knows no model and imports rich only to draw."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import GossamerError

if TYPE_CHECKING:
    from rich.console import Console

Progress: TypeAlias = Callable[[str, int, int], None]
"""progress(label, done, total): what the library calls as it works; commands hand it in."""

SECONDS_BETWEEN_LINES = 10.0
"""Where stderr is a file, progress is one line this often, not a bar."""


@cache
def console() -> Console:
    """The one console, on stderr; honours NO_COLOR and the width of the terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A progress callback: bars with the time left on a terminal, sparse lines in a file, nothing if quiet."""
    if quiet:
        yield lambda label, done, total: None
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        with _bars() as callback:
            yield callback


def emit_json(obj: Any) -> None:
    """Print obj as one JSON line on stdout; NaN and infinity are refused, for they are not JSON."""
    sys.stdout.write(json.dumps(obj, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def remark(text: str) -> None:
    """A side remark on stderr, dimmed on a terminal."""
    console().print(text, style="dim", markup=False)


def print_error(error: GossamerError) -> None:
    """One clean message on stderr: what is wrong, and the way out below it."""
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), error.message)
    if error.hint is not None:
        text.append(f"\n  {error.hint}")
    console().print(text)


class _Lines:
    """Progress for logs: a line now and then of what takes long, and one when that ends."""

    def __init__(self) -> None:
        self.label, self.last, self.long = "", 0.0, False

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label != self.label:
            self.label, self.last, self.long = label, now, False
        if now - self.last >= SECONDS_BETWEEN_LINES or (self.long and done >= total):
            self.last, self.long = now, done < total
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Bars(*columns, console=console(), transient=True) as bars:

        def callback(label: str, done: int, total: int) -> None:
            if label not in tasks:
                for old in tasks.values():
                    bars.remove_task(old)  # one bar at a time: a label that follows another replaces it
                tasks.clear()
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield callback
