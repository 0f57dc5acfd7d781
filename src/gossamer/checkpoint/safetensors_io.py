"""The safetensors container, read lazily and written as a stream. Knows no model and no weight format.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range) and the data. The reader trusts
none of it: ranges must be in bounds, fit dtype and shape, and cover the data without overlap or hole.
The writer orders tensors by falling alignment and then by name, so equal tensors give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import CorruptCheckpoint, GossamerError
from .atomic import disk_errors
from .files import RandomAccessFile, byte_view, parse_object

MAX_HEADER = 100_000_000
MAX_TENSORS = 1 << 17
"""In one file; the largest mixtures of experts have some 100,000 in all their files."""
MAX_VALUES = 12 * MAX_TENSORS
"""JSON values of a header or an index: a tensor's entry is about nine."""
MAX_DIMENSIONS = 16
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; `offset` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """A file of named tensors: what a folder is read through."""

    path: Path

    def names(self) -> tuple[str, ...]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str, rows: slice | None = None) -> torch.Tensor: ...


class SafetensorsFile:
    """One .safetensors file; only its header is read until a tensor is asked for. Raises CorruptCheckpoint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = RandomAccessFile(self.path)
        self.metadata: dict[str, str] = {}
        self._tensors = self._read_header()

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Raises CorruptCheckpoint if there is no such tensor."""
        if name not in self._tensors:
            raise CorruptCheckpoint(f"{self.path}: no tensor {name!r}")
        return self._tensors[name]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or these rows (first dimension, step 1) of it; nothing else is read from disk."""
        info = self.info(name)
        if rows is None or not info.shape:
            return self._file.read(info.offset, info.nbytes).view(info.dtype).reshape(info.shape)
        start, stop = row_range(rows, info.shape[0])
        row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
        data = self._file.read(info.offset + start * row_bytes, (stop - start) * row_bytes)
        return data.view(info.dtype).reshape(stop - start, *info.shape[1:])

    def _read_header(self) -> dict[str, TensorInfo]:
        if self._file.size < 8:
            raise CorruptCheckpoint(f"{self.path}: {self._file.size} bytes are too few for a safetensors file")
        length = int.from_bytes(self._file.read_bytes(0, 8), "little")
        if length > MAX_HEADER or length + 8 > self._file.size:
            raise CorruptCheckpoint(
                f"{self.path}: a header of {length} bytes in a file of {self._file.size} (limit {MAX_HEADER})"
            )
        raw = self._file.read_bytes(8, length)
        # A tensor's entry takes 40 bytes or more and opens three brackets: more of them is a bomb, not a header.
        if 12 * (raw.count(b"[") + raw.count(b"{")) > length + 64:
            raise CorruptCheckpoint(f"{self.path}: a header of brackets, not of tensors")
        header = parse_object(self._decoded(raw), f"{self.path}: header", unique=True, most=MAX_VALUES)
        self.metadata = self._check_metadata(header.pop("__metadata__", {}))
        if len(header) > MAX_TENSORS:
            raise CorruptCheckpoint(
                f"{self.path}: {len(header)} tensors, more than the {MAX_TENSORS} that are plausible"
            )
        tensors = {name: self._check_entry(name, entry, 8 + length) for name, entry in header.items()}
        self._check_cover(tensors, 8 + length)
        return tensors

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(f"{self.path}: header: not UTF-8: {error.reason} at byte {error.start}") from error

    def _check_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CorruptCheckpoint(f"{self.path}: __metadata__ is not an object of strings")
        return metadata

    def _check_entry(self, name: str, entry: Any, start: int) -> TensorInfo:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CorruptCheckpoint(f"{where}: its entry needs dtype, shape and data_offsets, and nothing else")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise CorruptCheckpoint(f"{where}: unknown dtype {code!r}", hint="known: " + ", ".join(DTYPES))
        if not _is_naturals(shape) or len(shape) > MAX_DIMENSIONS:
            raise CorruptCheckpoint(f"{where}: shape {str(shape)[:80]} is not a list of sizes")
        if not _is_naturals(offsets) or len(offsets) != 2:
            raise CorruptCheckpoint(f"{where}: data_offsets {str(offsets)[:80]} are not two positions")
        info = TensorInfo(DTYPES[code], tuple(shape), start + offsets[0])
        if offsets[1] - offsets[0] != info.nbytes:
            raise CorruptCheckpoint(
                f"{where}: {code} {shape} takes {info.nbytes} bytes, "
                f"data_offsets {offsets} give {offsets[1] - offsets[0]}"
            )
        return info

    def _check_cover(self, tensors: dict[str, TensorInfo], start: int) -> None:
        end = start
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if info.offset != end:
                fault = "overlaps the one before it" if info.offset < end else "leaves a hole before it"
                raise CorruptCheckpoint(f"{self.path}: tensor {name!r} at byte {info.offset} {fault} (byte {end})")
            end += info.nbytes
        if end != self._file.size:
            fault = "cut short" if end > self._file.size else "followed by bytes that belong to no tensor"
            raise CorruptCheckpoint(f"{self.path}: {fault}: tensors end at byte {end}, the file at {self._file.size}")


class Entry(NamedTuple):
    """One tensor to write: `chunks()` yields it in order, split along its first dimension as the caller likes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def whole(name: str, tensor: torch.Tensor) -> Entry:
    """The entry of a tensor that is in memory."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: iter((tensor,)))


def write_safetensors(path: Path, entries: Sequence[Entry]) -> str:
    """Write a .safetensors file, one chunk in memory at a time, fsync it, and return its sha256.

    Equal entries give equal bytes in whatever order they come. Raises DoesNotFit if the disk is full; the partial file
    is removed.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header = _header(ordered)
    digest = hashlib.sha256()
    with disk_errors(path), open(path, "wb", buffering=0) as file:
        try:
            _write(file.fileno(), header, digest)
            for entry in ordered:
                _write_entry(file.fileno(), entry, digest)
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)
            raise
    return digest.hexdigest()


def row_range(rows: slice, count: int) -> tuple[int, int]:
    """Start and stop of a slice over `count` rows. Raises ValueError unless its step is 1."""
    start, stop, step = rows.indices(count)
    if step != 1:
        raise ValueError(f"rows {rows} have a step; only contiguous rows are read")
    return start, max(start, stop)


def _header(entries: Sequence[Entry]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        if entry.name in fields:
            raise GossamerError(f"tensor {entry.name!r} would be written twice")
        fields[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    if len(text) > MAX_HEADER:
        raise GossamerError(f"a header of {len(text)} bytes, more than safetensors' {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _write_entry(fd: int, entry: Entry, digest: Any) -> None:
    written = 0
    for chunk in entry.chunks():
        if chunk.dtype != entry.dtype:
            raise GossamerError(f"tensor {entry.name!r}: a chunk of {chunk.dtype}, announced as {entry.dtype}")
        data = byte_view(chunk)
        _write(fd, data, digest)
        written += data.nbytes
    if written != entry.nbytes:
        raise GossamerError(f"tensor {entry.name!r}: {written} bytes of the {entry.nbytes} announced")


def _write(fd: int, data: bytes | memoryview, digest: Any) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
