"""Reading files that a stranger wrote: inside one folder, of bounded size, by position. Knows no format.

A model folder may name other files (shards, templates). Every such name passes `inside`, which refuses whatever leaves
the folder; the one link that may leave it is the hub cache's own, from `snapshots/<revision>/` to `blobs/`.
"""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch

from ..errors import CorruptCheckpoint, ModelNotFound, UnsafeCheckpoint

MAX_JSON = 16 << 20
"""Bytes of a config; the files that list tokens or tensors have limits of their own."""


class RandomAccessFile:
    """A regular file read by position with pread: no cursor, no mapping. Raises ModelNotFound, CorruptCheckpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
                raise CorruptCheckpoint(f"{path}: not a regular file")
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelNotFound(f"{path}: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        self._close()

    def read(self, offset: int, count: int) -> torch.Tensor:
        """`count` bytes from `offset` as uint8 [count]."""
        if not 0 <= offset <= offset + count <= self.size:
            raise CorruptCheckpoint(f"{self.path}: bytes {offset} to {offset + count} of a file of {self.size} bytes")
        buffer = torch.empty(count, dtype=torch.uint8)
        view = byte_view(buffer)
        done = 0
        while done < count:
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CorruptCheckpoint(f"{self.path}: cannot be read: {error.strerror}") from error
            if got == 0:
                raise CorruptCheckpoint(f"{self.path}: ends at byte {offset + done}; it had {self.size} when opened")
            done += got
        return buffer

    def read_bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`."""
        return self.read(offset, count).numpy().tobytes()


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, writable and without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(cast(Any, flat.numpy()))


def inside(folder: Path, name: object) -> Path:
    """The path of a file that a model folder names. Raises UnsafeCheckpoint if it would leave the folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise UnsafeCheckpoint(f"{folder}: {name!r} is not a file name")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise UnsafeCheckpoint(f"{folder}: {name!r} leaves the folder")
    path = folder / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UnsafeCheckpoint(f"{path}: a link that cannot be followed") from error
    if not target.is_relative_to(_root(folder)):
        raise UnsafeCheckpoint(
            f"{path}: a link to {target}, outside the folder", hint="copy the file into the folder if you trust it"
        )
    return path


def has(folder: Path, name: str) -> bool:
    """True if the folder has this file."""
    return inside(folder, name).is_file()


def read_limited(path: Path, limit: int) -> bytes:
    """A whole small file. Raises CorruptCheckpoint if it is larger than `limit` bytes."""
    file = RandomAccessFile(path)
    try:
        if file.size > limit:
            raise CorruptCheckpoint(f"{path}: {file.size} bytes, more than the {limit} that are plausible")
        return file.read_bytes(0, file.size)
    finally:
        file.close()


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """A whole small UTF-8 file."""
    try:
        return read_limited(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object in a small file. Raises CorruptCheckpoint."""
    return parse_object(read_text(path, limit), str(path))


def parse_object(text: str | bytes, where: str, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from text; `unique` refuses a key that is given twice. Raises CorruptCheckpoint naming `where`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CorruptCheckpoint(f"{where}: not valid JSON: {str(error)[:200] or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def stamps(paths: Iterable[Path]) -> list[list[str | int]]:
    """Path, size and time of change of each file: what a cached hash of them is filed under."""
    found: list[list[str | int]] = []
    for path in sorted({p.resolve() for p in paths}):
        status = path.stat()
        found.append([str(path), status.st_size, status.st_mtime_ns])
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return result


def _root(folder: Path) -> Path:
    # .../models--org--name/snapshots/<revision>/x is a link to .../models--org--name/blobs/<hash>
    folder = folder.resolve()
    repository = folder.parent.parent
    in_hub_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if in_hub_cache else folder
