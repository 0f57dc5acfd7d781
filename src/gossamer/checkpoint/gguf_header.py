"""The header of a GGUF file, read with suspicion: metadata and where each tensor lies. Knows no model.

Every count, length, dimension and offset is checked against what is left of the file before anything is allocated.
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptCheckpoint, UnsupportedModel
from .files import RandomAccessFile
from .gguf_blocks import TYPES

MAX_HEADER = 256 << 20
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 22
"""In all arrays together: some times the largest vocabulary with its merges."""
MAX_ARRAYS = 1 << 16
"""In all arrays of arrays together."""
MAX_DEPTH = 2
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
_CHUNK = 1 << 20
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),  # bool
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U64 = struct.Struct("<Q")
_NEVER = 1 << 64


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies, and as what."""

    kind: str
    """Its GGML type, such as `Q4_1`."""
    shape: tuple[int, ...]
    """[rows, columns], the other way round than in the file."""
    offset: int
    """From the start of the file."""
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // math.prod(self.shape[:-1])


class Metadata:
    """Typed look-ups in a GGUF file's key-value pairs. Raises CorruptCheckpoint naming the key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self._path = values, path

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, key: str, default: int | None = None) -> int | None:
        value: int | None = self._get(key, int, default)
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self._get(key, (int, float), default)
        return None if value is None else float(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        value: str | None = self._get(key, str, default)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, (bool,), default))

    def need(self, key: str, low: int = 1, high: int = 1 << 31) -> int:
        """An integer that must be there and in range."""
        value = self.integer(key)
        if value is None or not low <= value <= high:
            raise CorruptCheckpoint(f"{self._path}: {key} is {value!r}, expected an integer from {low} to {high}")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of strings."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or set(map(type, value)) - {str}:
            raise CorruptCheckpoint(f"{self._path}: {key} is not a list of strings")
        return value

    def numbers(self, key: str) -> np.ndarray[Any, Any] | None:
        """An array of numbers."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise CorruptCheckpoint(f"{self._path}: {key} is not an array of numbers")
        return value

    def _get(self, key: str, kind: Any, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not str and kind != (bool,)):
            raise CorruptCheckpoint(f"{self._path}: {key} is {shown(value)}, a {type(value).__name__}")
        return value


def shown(value: Any) -> str:
    """A metadata value for a message: short, however long it is."""
    return reprlib.repr(value)[:80]


def read_header(file: RandomAccessFile) -> tuple[Metadata, dict[str, GGUFTensor]]:
    """Metadata and tensors of a GGUF file of version 2 or 3. Raises CorruptCheckpoint, UnsupportedModel."""
    cursor = _Cursor(file)
    if cursor.take(4) != b"GGUF":
        raise CorruptCheckpoint(f"{file.path}: does not start with GGUF")
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise UnsupportedModel(f"{file.path}: a big-endian GGUF file")
    if version not in {2, 3}:
        raise UnsupportedModel(f"{file.path}: GGUF version {version}", hint="versions 2 and 3 are read")
    tensor_count, pair_count = cursor.count(24, "tensors", MAX_TENSORS), cursor.count(13, "pairs", MAX_PAIRS)
    values: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string("a key")
        if key in values:
            raise CorruptCheckpoint(f"{file.path}: key {key!r} is given twice")
        values[key] = cursor.value(cursor.u32(), key, 0)
    metadata = Metadata(values, file.path)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    return metadata, _place(file, infos, cursor.position, _alignment(metadata, file))


class _Cursor:
    """Reads the header from front to back, fetching the file in pieces as it goes."""

    def __init__(self, file: RandomAccessFile) -> None:
        self._file, self._buffer, self.position = file, bytearray(), 0
        self._limit = min(file.size, MAX_HEADER)
        self._strings_left, self._arrays_left = MAX_STRINGS, MAX_ARRAYS

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self._limit:
            raise CorruptCheckpoint(
                f"{self._file.path}: {count} bytes wanted at byte {self.position}, the header may go to {self._limit}"
            )
        while len(self._buffer) < end:
            have = len(self._buffer)
            self._buffer += self._file.read_bytes(have, min(max(_CHUNK, end - have), self._limit - have))
        data = bytes(self._buffer[self.position : end])
        self.position = end
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self, size: int, what: str, most: int | None = None) -> int:
        """A count of things that take at least `size` bytes each; `most` where each takes far more of memory."""
        count = self.u64()
        if most is not None and count > most:
            raise CorruptCheckpoint(f"{self._file.path}: {count} {what}, more than the {most} that are plausible")
        if count * size > self._limit - self.position:
            raise CorruptCheckpoint(
                f"{self._file.path}: {count} {what}, but only {self._limit - self.position} bytes are left"
            )
        return count

    def string(self, what: str) -> str:
        return self._decoded(self.take(self.count(1, f"bytes in {what}")), what)

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings, by the shortest way where they are in the buffer already: vocabularies have 100,000."""
        buffer, found = self._buffer, list[str]()
        for _ in range(count):
            start = self.position + 8
            end = start + _U64.unpack_from(buffer, start - 8)[0] if start <= len(buffer) else _NEVER
            if end > len(buffer):  # more is to be read, or refused
                found.append(self.string(what))
                continue
            self.position = end
            found.append(self._decoded(buffer[start:end], what))
        return found

    def _decoded(self, data: bytes | bytearray, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(f"{self._file.path}: {what} is not UTF-8 (before byte {self.position})") from error

    def value(self, kind: int, key: str, depth: int) -> Any:
        """A metadata value: number, bool, string, numpy array of numbers, or list of strings or of arrays."""
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key, depth + 1)
        scalar = np.frombuffer(self.take(self._scalar(kind, key).itemsize), self._scalar(kind, key))[0].item()
        return bool(scalar) if kind == _BOOL else scalar

    def _array(self, key: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CorruptCheckpoint(f"{self._file.path}: {key}: arrays nested more than {MAX_DEPTH} deep")
        kind = self.u32()
        if kind == _STRING:
            count = self.count(8, f"strings in {key}", self._strings_left)
            self._strings_left -= count
            return self.strings(count, key)
        if kind == _ARRAY:
            count = self.count(12, f"arrays in {key}", self._arrays_left)
            self._arrays_left -= count
            return [self._array(key, depth + 1) for _ in range(count)]
        dtype = self._scalar(kind, key)
        return np.frombuffer(self.take(self.count(dtype.itemsize, f"numbers in {key}") * dtype.itemsize), dtype)

    def _scalar(self, kind: int, key: str) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise CorruptCheckpoint(f"{self._file.path}: {key}: unknown value type {kind}")
        return _SCALARS[kind]


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("a tensor's name")
    dimensions = cursor.u32()
    where = f"{cursor._file.path}: tensor {name!r}"
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CorruptCheckpoint(f"{where}: {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    if 0 in shape:
        raise CorruptCheckpoint(f"{where}: a dimension of zero in {list(shape)}")
    return name, tuple(reversed(shape)), cursor.u32(), cursor.u64()


def _alignment(metadata: Metadata, file: RandomAccessFile) -> int:
    alignment = metadata.integer("general.alignment", 32) or 0
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CorruptCheckpoint(
            f"{file.path}: general.alignment {alignment} is not a power of two up to {MAX_ALIGNMENT}"
        )
    return alignment


def _place(
    file: RandomAccessFile, infos: list[tuple[str, tuple[int, ...], int, int]], header: int, alignment: int
) -> dict[str, GGUFTensor]:
    start = -(-header // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, number, offset in infos:
        where = f"{file.path}: tensor {name!r}"
        if name in tensors:
            raise CorruptCheckpoint(f"{where} is given twice")
        kind, block, size = _block(number, where)
        if shape[-1] % block:
            raise CorruptCheckpoint(f"{where}: rows of {shape[-1]} are not whole blocks of {block} ({kind})")
        tensor = GGUFTensor(kind, shape, start + offset, math.prod(shape) // block * size)
        if offset % alignment or tensor.offset + tensor.nbytes > file.size:
            raise CorruptCheckpoint(
                f"{where}: {kind} {list(shape)} takes bytes {tensor.offset} to {tensor.offset + tensor.nbytes}, "
                f"the file has {file.size} and its alignment is {alignment}"
            )
        tensors[name] = tensor
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise CorruptCheckpoint(f"{file.path}: tensor {name!r} overlaps the one before it")
        end = tensor.offset + tensor.nbytes
    return tensors


def _block(number: int, where: str) -> tuple[str, int, int]:
    if number not in TYPES:
        raise UnsupportedModel(f"{where}: unknown GGML type {number}")
    return TYPES[number]
