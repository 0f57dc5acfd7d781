"""What a server and its engine worker say to each other, and the pipe between them. Knows no engine and no HTTP.

A frame is four bytes of length, big-endian, and a pickled message. The pipe is a socket pair that only a parent and its
child hold, so that what is unpickled comes from this package's own code.
"""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..engine.params import SamplingParams
from ..engine.sequence import EngineStats, Output
from ..errors import GossamerError

HEADER = 4
MAX_FRAME = 1 << 30


@dataclass(frozen=True)
class WorkerSpec:
    """How a worker makes its engine: `factory`, named as "module:function", called with these arguments."""

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False
    """Let the engine say on stderr what computes."""


# --- to the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Add:
    """Run these prompts (token ids), each as a request of its own: all of them, or none if one cannot be served."""

    ids: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams


@dataclass(frozen=True)
class Abort:
    """Forget these requests."""

    ids: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """End, now."""


# --- from the worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The engine is there, and what it can take."""

    max_prompt_tokens: int
    """Most tokens of a prompt: one less than prompt and answer may have together."""
    max_sequences: int
    description: str


@dataclass(frozen=True)
class Failed:
    """The worker gives up: an exception, as text."""

    kind: str
    message: str
    hint: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        if isinstance(error, GossamerError):
            return cls(type(error).__name__, error.message, error.hint)
        return cls(type(error).__name__, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Added:
    """An Add was taken."""

    ids: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """An Add was not taken: what is wrong with it."""

    ids: tuple[str, ...]
    message: str
    hint: str | None = None


@dataclass(frozen=True)
class Stepped:
    """What a step gave, or only how the engine stands."""

    outputs: tuple[Output, ...]
    started: tuple[str, ...]
    """Requests that left the queue."""
    stats: EngineStats


@dataclass(frozen=True)
class Beat:
    """The process lives; `busy`: seconds that what it does now has taken so far."""

    busy: float


ToWorker: TypeAlias = WorkerSpec | Add | Abort | Stop
FromWorker: TypeAlias = Ready | Failed | Added | Refused | Stepped | Beat


def frame(message: ToWorker | FromWorker) -> bytes:
    """A message as bytes."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(HEADER, "big") + data


def size(header: bytes) -> int:
    """Length of the message that this header announces. Raises GossamerError if nobody sends such ones."""
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME:
        raise GossamerError(f"a message of {length:,} bytes between server and worker")
    return length


def parsed(data: bytes) -> Any:
    """The message in a frame without its header."""
    return pickle.loads(data)  # noqa: S301 - from our own process, over a socket that nobody else holds


class Pipe:
    """A worker's end: it waits, and any thread may send."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, message: FromWorker) -> None:
        with self._sending:
            self._socket.sendall(frame(message))

    def receive(self) -> Any:
        """The next message. Raises EOFError when the other side has gone."""
        return parsed(self._read(size(self._read(HEADER))))

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._socket.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)
