"""Rows as JSON, and files written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MeasureError, UsageError
from .columns import COLUMNS
from .protocol import notes, protocols
from .rows import Row

_FACTS = ("name", "fingerprint", "base", "recipe", "note", "format", "parameters", "baseline", "engine", "failed")


def to_json(rows: Sequence[Row]) -> str:
    """`{"rows": [...], "notes": [...]}` on one line; ASCII only, so safe on any terminal.

    NaN and infinity become strings.
    """
    found = protocols(rows)
    value = {"rows": [_plain(row, found.mark(i)) for i, row in enumerate(rows)], "notes": notes(rows)}
    return json.dumps(value, allow_nan=False)


def _plain(row: Row, mark: str) -> dict[str, Any]:
    """One row: the model, every column by its key, and what failed."""
    known = {name: getattr(row, name) for name in _FACTS}
    memory = row.bench.results if row.bench else None
    numbers = {column.key: _number(column.value(row)) for column in COLUMNS}
    errors = {record.kind: record.error for record in row.failures}
    numbers["rm_weights_bytes"] = memory.rm_weights_bytes if memory else None
    numbers["rm_kv_bytes_per_token"] = _number(memory.rm_kv_bytes_per_token) if memory else None
    return {**known, **numbers, "errors": errors, "protocol_mark": mark or None}


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text through a temporary sibling, fsync and rename: the path is absent, old or complete.

    Raises UsageError if the path is a folder, MeasureError if it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder", hint="name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(text.encode("utf-8", errors="replace"))
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; a report is not
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise MeasureError(f"{path}: cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
