"""What is finished, on disk, so that a killed run goes on where it stopped. Knows no model and no method.

A work folder holds one file per finished unit and `journal.jsonl`: a header that says exactly what is being made,
then one line per unit with its file's hash. A unit counts once its line is on disk. A resume with another header stops.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ResumeMismatch

NAME = "journal.jsonl"


class Journal:
    """The journal of one work folder; `done` maps each finished unit to its recorded notes."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Open or begin. Raises ResumeMismatch naming the first difference, or the damaged line."""
        self.folder = folder
        self.path = folder / NAME
        self.done: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        if not lines:
            self._append({"header": header})
        else:
            self._check_header(lines[0], header)
            for number, line in enumerate(lines[1:], start=2):
                self._load(number, line)

    def add(self, unit: str, file: Path, notes: Mapping[str, Any]) -> None:
        """Record a unit whose file is complete and synced."""
        entry = {"unit": unit, "file": file.name, "sha256": file_hash(file), "notes": dict(notes)}
        self._append(entry)
        self.done[unit] = entry

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        complete = raw[: raw.rfind(b"\n") + 1]
        if complete != raw:  # killed while writing the last line: that unit is simply not done
            with self.path.open("r+b") as f:
                f.truncate(len(complete))
        lines = []
        for number, text in enumerate(complete.splitlines(), start=1):
            try:
                line = json.loads(text)
            except ValueError as e:
                raise self._damaged(number) from e
            if not isinstance(line, dict):
                raise self._damaged(number)
            lines.append(line)
        return lines

    def _check_header(self, line: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        if "header" not in line:
            raise self._damaged(1)
        for path, was, now in differences(line["header"], json.loads(json.dumps(header))):
            raise ResumeMismatch(
                f"{self.folder} holds unfinished work of another run: {path} was {was!r}, is now {now!r}",
                hint="repeat the earlier command to finish it, or give --restart to discard it",
            )

    def _load(self, number: int, line: dict[str, Any]) -> None:
        try:
            unit, file, expected = line["unit"], self.folder / Path(line["file"]).name, line["sha256"]
            line["notes"]
        except (KeyError, TypeError) as e:
            raise self._damaged(number) from e
        if not file.exists() or file_hash(file) != expected:
            raise ResumeMismatch(
                f"{file} is not the file that {self.path.name} line {number} records (sha256 {str(expected)[:12]}...)",
                hint="give --restart to discard the unfinished work",
            )
        self.done[unit] = line

    def _damaged(self, number: int) -> ResumeMismatch:
        return ResumeMismatch(
            f"{self.path} line {number} is damaged", hint="give --restart to discard the unfinished work"
        )

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("ab") as f:
            f.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


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


def file_hash(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
