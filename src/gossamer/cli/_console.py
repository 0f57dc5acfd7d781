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
    """The one console, on stderr; honours NO_COLOR and the width of the terminal.

    No markup: names of models and files are shown as they are, whatever brackets they have.
    """
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


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
    console().print(text, style="dim")


@contextmanager
def log_remarks(name: str, quiet: bool = False) -> Iterator[None]:
    """What a logger of the library says is a remark, for as long as this lasts; nothing if quiet."""
    import logging

    class Remarks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            remark(record.getMessage())

    logger, handler = logging.getLogger(name), Remarks()
    if not quiet:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def print_error(error: GossamerError) -> None:
    """One clean message on stderr: what is wrong, and the way out below it."""
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), error.message)
    if error.hint is not None:
        text.append(f"\n  {error.hint}")
    console().print(text)


class _Lines:
    """Progress for logs: a line now and then of what takes long, with the time left, and one when that ends."""

    def __init__(self) -> None:
        self.label, self.first, self.done = "", 0, 0
        self.start, self.last, self.long = 0.0, 0.0, False

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label != self.label or done < self.done:  # other work, or the same kind once more
            self.label, self.last, self.long = label, now, False
            self.start, self.first = now, done
        self.done = done
        if now - self.last >= SECONDS_BETWEEN_LINES or (self.long and done >= total):
            self.last, self.long = now, done < total
            print(f"{label}: {done}/{total}{self._left(now, total)}", file=sys.stderr, flush=True)

    def _left(self, now: float, total: int) -> str:
        """The time left, if what is done since the start tells it."""
        done = self.done - self.first
        if done == 0 or self.done >= total:
            return ""
        return f", about {duration((now - self.start) * (total - self.done) / done)} left"


def duration(seconds: float) -> str:
    """A length of time, as coarse as an estimate deserves: 40 s, 12 min, 2 h 5 min."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    # A block of a large model takes minutes: speed is estimated from the last hour, or there would be no time left.
    with Bars(*columns, console=console(), transient=True, speed_estimate_period=3600) as bars:

        def callback(label: str, done: int, total: int) -> None:
            if label not in tasks:
                for old in tasks.values():
                    bars.remove_task(old)  # one bar at a time: a label that follows another replaces it
                tasks.clear()
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield callback
