"""Messages between an engine and its ranks: a JSON header and plain arrays, over a socket. Nothing is unpickled.

A frame is two lengths of four bytes, big-endian (header, arrays), the header, and the arrays one after another. What
arrives is not believed: kinds, dtypes and sizes are checked before anything is made of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError

KINDS = frozenset({"join", "place", "load", "reserve", "step", "head", "stop", "beat", "ready", "done", "failed"})
DTYPES: dict[str, np.dtype[Any]] = {"int32": np.dtype("<i4"), "int64": np.dtype("<i8"), "float32": np.dtype("<f4")}
MAX_HEADER = 1 << 16
MAX_ARRAYS = (1 << 31) - 1
_LENGTHS = struct.Struct(">II")


@dataclass(frozen=True)
class Message:
    """Something said: its kind, named values that JSON has, and arrays."""

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: tuple[NDArray[Any], ...] = ()

    def value(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A named value of this type. Raises EngineError."""
        found = self.values.get(name)
        if not isinstance(found, kind):
            raise _odd(f"{self.kind}: {name} is {found!r:.80}")
        return found


def frame(message: Message) -> bytes:
    """A message as bytes."""
    shapes = [(array.dtype.name, list(array.shape)) for array in message.arrays]
    header = json.dumps({"kind": message.kind, "values": message.values, "arrays": shapes}).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in message.arrays)
    if len(header) > MAX_HEADER or len(body) > MAX_ARRAYS:
        raise EngineError(f"a message of {len(header) + len(body):,} bytes is too long to be sent to another rank")
    return _LENGTHS.pack(len(header), len(body)) + header + body


def parsed(header: bytes, body: bytes) -> Message:
    """The message that a frame holds. Raises EngineError for one that nobody of ours has sent."""
    try:
        said = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _odd("its header is no JSON") from error
    if not isinstance(said, dict) or set(said) != {"kind", "values", "arrays"}:
        raise _odd("its header has other keys")
    kind, values, shapes = said["kind"], said["values"], said["arrays"]
    if not isinstance(kind, str) or kind not in KINDS or not isinstance(values, dict) or not isinstance(shapes, list):
        raise _odd(f"kind {kind!r:.80}")
    arrays, at = [], 0
    for shape in shapes:
        dtype, sizes = _shape(shape)
        count = math.prod(sizes)
        if count * dtype.itemsize > len(body) - at:
            raise _odd(f"an array {list(sizes)} is longer than the message")
        arrays.append(np.frombuffer(body, dtype, count, at).reshape(sizes))
        at += count * dtype.itemsize
    if at != len(body):
        raise _odd(f"{len(body) - at} bytes are left over")
    return Message(kind, values, tuple(arrays))


class Wire:
    """One end of a connection: one thread receives, any may send."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises OSError when the other side has gone."""
        data = frame(message)
        with self._sending:
            self._socket.sendall(data)

    def receive(self) -> Message:
        """The next message. Raises EOFError or OSError when the other side has gone, EngineError for nonsense."""
        header, body = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if header > MAX_HEADER or body > MAX_ARRAYS:
            raise _odd(f"it claims {header:,} and {body:,} bytes")
        return parsed(self._read(header), self._read(body))

    def cut(self) -> None:
        """Have nothing go either way any more: whoever waits at either end is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:  # grows with what has come, not with what was claimed
            piece = self._socket.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


def _shape(said: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Dtype and sizes of an array as a header says them."""
    if not isinstance(said, list) or len(said) != 2 or not isinstance(said[0], str) or said[0] not in DTYPES:
        raise _odd(f"an array {said!r:.80}")
    sizes = said[1]
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= 2 or not all(type(n) is int and n >= 0 for n in sizes):
        raise _odd(f"an array of shape {sizes!r:.80}")
    return DTYPES[said[0]], tuple(sizes)


def _odd(what: str) -> EngineError:
    return EngineError(f"a message between ranks makes no sense: {what}")
