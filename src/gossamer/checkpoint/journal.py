"""What is finished, on disk, so that a killed run goes on where it stopped. Knows no model and no method.

A work folder holds one file per finished unit and `journal.jsonl`: a header that says exactly what is being made,
then one line per unit with its file's hash; of several lines for a unit the last counts. Every line carries a hash of
itself. A unit counts once its file, its name in the folder and its line are on disk. A resume with another header
stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ResumeMismatch
from .atomic import sync
from .manifest import sha256

NAME = "journal.jsonl"


class Journal:
    """The journal of one work folder; `done` maps each finished unit to its recorded notes."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Open or begin. Raises ResumeMismatch naming the first difference, or the damaged line."""
        self.folder = folder
        self.path = folder / NAME
        self.done: dict[str, dict[str, Any]] = {}
        if not folder.exists():
            folder.mkdir(parents=True)
            sync(folder.parent)
        lines = require_same(folder, header)
        if not lines:
            self._append({"header": header})
            sync(folder)
        latest = {line["unit"]: (number, line) for number, line in enumerate(lines[1:], start=2)}
        for number, line in sorted(latest.values(), key=lambda item: item[0]):
            self._load(number, line)

    def add(self, unit: str, file: Path, notes: Mapping[str, Any]) -> None:
        """Record a unit whose file is complete and synced.

        A unit may be recorded again, in a file of another name: the last line counts, and the earlier file goes.
        """
        before = self.done.get(unit)
        entry = {"unit": unit, "file": file.name, "sha256": sha256(file), "notes": dict(notes)}
        sync(self.folder)  # before the line that relies on the file's name
        self._append(entry)
        self.done[unit] = entry
        if before is not None and before["file"] != file.name:
            (self.folder / before["file"]).unlink(missing_ok=True)

    def _load(self, number: int, line: dict[str, Any]) -> None:
        unit, file, expected = line["unit"], self.folder / Path(line["file"]).name, line["sha256"]
        if not file.exists() or sha256(file) != expected:
            raise ResumeMismatch(
                f"{file} is not the file that {self.path.name} line {number} records (sha256 {expected[:12]}...)",
                hint="give --restart to discard the unfinished work",
            )
        self.done[unit] = line

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("ab") as f:
            f.write(json.dumps({**entry, "check": _check(entry)}, sort_keys=True).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


def require_same(folder: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a work folder's journal, none if there is none.

    Raises ResumeMismatch if it is of other work, naming the first of these keys that differs, in their order.
    """
    lines = _read(folder / NAME)
    now = json.loads(json.dumps(header))
    was = lines[0]["header"] if lines else now
    for key in now:
        for path, old, new in differences(was.get(key), now[key], key):
            raise ResumeMismatch(
                f"{folder} holds unfinished work of another run: {path} was {old!r}, is now {new!r}",
                hint="repeat the earlier command to finish it, or give --restart to discard it",
            )
    return lines


def discard(folder: Path) -> None:
    """Remove a work folder, if it is there: its journal first, so that a kill on the way leaves no promise behind."""
    if folder.exists():
        (folder / NAME).unlink(missing_ok=True)
        sync(folder)
        shutil.rmtree(folder)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, each found undamaged; one cut off by a kill is removed, for that unit is not done."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    if complete != raw:
        with path.open("r+b") as f:
            f.truncate(len(complete))
    return [_parse(path, number, text) for number, text in enumerate(complete.splitlines(), start=1)]


def _parse(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
        intact = line.pop("check") == _check(line) and ("header" in line) == (number == 1)
    except (ValueError, LookupError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise ResumeMismatch(f"{path} line {number} is damaged", hint="give --restart to discard the unfinished work")
    return dict(line)


def _check(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def differences(was: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place at which two JSON values differ: its path, the old value, the new one."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (a, b) in enumerate(zip(was, now, strict=True)):
            yield from differences(a, b, f"{path}[{i}]")
    elif was != now:
        yield path, was, now
