"""Reading files that a stranger wrote: inside one folder, of bounded size, by position. Knows no format.

Torch is loaded when a tensor is asked for: a tokenizer and a server do without.
A model folder may name other files (shards, templates). Every such name passes `inside`, which refuses whatever leaves
the folder; the one link that may leave it is the hub cache's own, from `snapshots/<revision>/` to `blobs/`.
"""

from __future__ import annotations

import json
import os
import re
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from ..errors import CorruptCheckpoint, ModelNotFound, UnsafeCheckpoint

if TYPE_CHECKING:
    import torch

MAX_JSON = 16 << 20
"""Bytes of a config; the files that list tokens or tensors have limits of their own."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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
        import torch

        self._check(offset, count)
        buffer = torch.empty(count, dtype=torch.uint8)
        self._fill(byte_view(buffer), offset)
        return buffer

    def read_bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`."""
        self._check(offset, count)
        buffer = bytearray(count)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def _check(self, offset: int, count: int) -> None:
        if not 0 <= offset <= offset + count <= self.size:
            raise CorruptCheckpoint(f"{self.path}: bytes {offset} to {offset + count} of a file of {self.size} bytes")

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CorruptCheckpoint(f"{self.path}: cannot be read: {error.strerror}") from error
            if got == 0:
                raise CorruptCheckpoint(f"{self.path}: ends at byte {offset + done}; it had {self.size} when opened")
            done += got


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, writable and without a copy if it is contiguous."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(cast(Any, flat.numpy()))


def inside(folder: Path, name: object) -> Path:
    """The path of a file that a model folder names, whether it is there or not.

    Raises UnsafeCheckpoint if it would leave the folder, CorruptCheckpoint if no file can have this name.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or _SURROGATE.search(name):
        raise UnsafeCheckpoint(f"{folder}: {str(name)[:200]!r} is not a file name")
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
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CorruptCheckpoint(f"{folder}: {name[:200]!r}: {error.strerror}") from error
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


def read_json(path: Path, limit: int = MAX_JSON, *, most: int | None = None) -> dict[str, Any]:
    """A JSON object in a small file, of at most `most` values. Raises CorruptCheckpoint."""
    return parse_object(read_text(path, limit), str(path), most=most)


def parse_object(text: str, where: str, *, unique: bool = False, most: int | None = None) -> dict[str, Any]:
    """A JSON object from text; `unique` refuses a key that is given twice, `most` more values than that.

    Raises CorruptCheckpoint naming `where`.
    """
    # Before parsing: a value takes two bytes of text and up to a hundred times as many of memory.
    if most is not None and (values := text.count(",") + text.count(":")) > most:
        raise CorruptCheckpoint(f"{where}: about {values} values, more than the {most} that are plausible")
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CorruptCheckpoint(f"{where}: not valid JSON: {str(error)[:200] or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{where}: expected a JSON object, found {type(value).__name__}")
    if _ESCAPED_SURROGATE.search(text):
        _refuse_surrogates(value, where)
    return value


def stamps(paths: Iterable[Path]) -> list[list[str | int]]:
    """Path, identity, size and times of change of each file: what a cached hash of them is filed under.

    The identity and the inode's own time are there because anyone can set the time of modification back.
    """
    found: list[list[str | int]] = []
    for path in sorted({p.resolve() for p in paths}):
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found.append([str(path), status.st_dev, status.st_ino, status.st_size, *times])
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {name[:200]!r} is given twice")
        result[name] = value
    return result


def _refuse_surrogates(value: Any, where: str) -> None:
    """Half a UTF-16 pair is a string to JSON, but can be neither a file's name nor written to any file."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) and _SURROGATE.search(item):
            raise CorruptCheckpoint(f"{where}: {item[:200]!r} holds half of a surrogate pair, which is no character")
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item


def _root(folder: Path) -> Path:
    # .../models--org--name/snapshots/<revision>/x is a link to .../models--org--name/blobs/<hash>
    folder = folder.resolve()
    repository = folder.parent.parent
    in_hub_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if in_hub_cache else folder
