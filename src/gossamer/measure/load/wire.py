"""One HTTP request over a connection of its own, and every piece of the response with the moment of its arrival.

A load is often measured on the machine that serves it, where each microsecond of the client is one less for the
server. So arrivals are only noted here, and read when the load is over (see answer.py); and the bytes come straight
from asyncio's transport: through httpx2 each piece took 110 microseconds of a core, this way 35. The clock starts when
the connection is there. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import urlsplit

CHUNKED, UNTIL_CLOSED = -1, -2
"""How a body ends, where it is not a number of bytes."""


@dataclass
class Exchange:
    """What came back, undigested."""

    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """As the system gave them, head and all, with the clock's reading (time.perf_counter)."""
    sent: float = 0.0
    ended: float = 0.0
    error: str | None = None
    """Why there is no whole response, if it is not for the bytes to say."""

    @property
    def nbytes(self) -> int:
        return sum(len(data) for _, data in self.pieces)


async def exchange(url: str, headers: Mapping[str, str], body: bytes, timeout: float) -> Exchange:
    """POST a body and take in the response to its end. A fault of server or network is noted, not raised."""
    got = Exchange(sent=time.perf_counter())
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(timeout) as limit:
            transport, receiver = await _connect(url, got)
            got.sent = time.perf_counter()
            transport.write(_head(url, headers, len(body)) + body)
            await receiver.finished
    except OSError as error:  # TimeoutError is one, ours and the system's
        over = isinstance(error, TimeoutError) and limit.expired()
        got.error = f"timeout: not complete after {timeout:g} s" if over else f"connection: {error.strerror or error}"
    finally:
        got.ended = time.perf_counter()
        if transport is not None:
            transport.abort()
    return got


class _Receiver(asyncio.Protocol):
    """Notes what arrives, until the response is complete or the connection ends."""

    def __init__(self, got: Exchange) -> None:
        self.got = got
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._body = Body()

    def data_received(self, data: bytes) -> None:
        pieces = self.got.pieces
        pieces.append((time.perf_counter(), data))
        # Most servers close, as they are asked to. Whoever does not is done when the body is, which costs a look at
        # the end of each piece; only what looks like the end is taken apart here.
        if self._body.status == 0 or self._body.framing >= 0 or data.endswith(b"0\r\n\r\n"):
            self._body = read_body([piece for _, piece in pieces])
            if self._body.complete and self._body.framing != UNTIL_CLOSED:
                self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.finished.done():
            self.got.error = f"connection: {exc}"
        self._finish()

    def _finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)


async def _connect(url: str, got: Exchange) -> tuple[asyncio.Transport, _Receiver]:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    return await asyncio.get_running_loop().create_connection(
        lambda: _Receiver(got), parts.hostname or "", port, ssl=_tls() if secure else None
    )


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _head(url: str, headers: Mapping[str, str], length: int) -> bytes:
    parts = urlsplit(url)
    sent = {
        "Host": parts.netloc,
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(length),
        "Accept": "text/event-stream",
        **headers,
    }
    lines = [f"POST {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@dataclass
class Body:
    """A response taken apart."""

    status: int = 0
    """0: the head is not complete."""
    framing: int = UNTIL_CLOSED
    """Bytes of the body, CHUNKED or UNTIL_CLOSED."""
    parts: list[bytes] = field(default_factory=list)
    """What each piece added to the body."""
    complete: bool = False


def read_body(pieces: list[bytes]) -> Body:
    """Take apart a response that may have more to come. Raises nothing: what is no HTTP has status 0."""
    body, rest, got = Body(), b"", 0
    chunks = _Chunks()
    for data in pieces:
        if body.status == 0:
            head, found, after = (rest + data).partition(b"\r\n\r\n")
            if not found:
                rest, data = head, b""
            else:
                body.status, body.framing = _parse_head(head)
                data = after
        if body.status and body.framing == CHUNKED:
            data = chunks.feed(data)
        body.parts.append(data)
        got += len(data)
    body.complete = bool(body.status) and {CHUNKED: chunks.ended, UNTIL_CLOSED: True}.get(
        body.framing, got >= body.framing
    )
    return body


def _parse_head(head: bytes) -> tuple[int, int]:
    """Status and framing."""
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    status = int(words[1]) if len(words) > 1 and words[0].startswith("HTTP/") and words[1].isdigit() else 0
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return status, CHUNKED
    length = fields.get("content-length", "")
    return status, int(length) if length.isdigit() else UNTIL_CLOSED


class _Chunks:
    """The transfer coding `chunked`, undone as it arrives."""

    def __init__(self) -> None:
        self.rest, self.ended = b"", False
        self._left = 0
        """Bytes of the present chunk that have not come; below 0: of the line end behind it."""

    def feed(self, data: bytes) -> bytes:
        """What these bytes add to the body; a chunk of which a part has come adds that part."""
        self.rest += data
        out = []
        while self.rest and not self.ended:
            if self._left > 0:
                piece, self.rest = self.rest[: self._left], self.rest[self._left :]
                self._left -= len(piece)
                out.append(piece)
                continue
            line, found, after = self.rest.lstrip(b"\r\n").partition(b"\r\n")
            if not found:
                break
            size = line.split(b";")[0].strip()
            try:
                self._left = int(size, 16)
            except ValueError:  # no chunk: the stream is broken, and never ends well
                self.rest = b""
                break
            self.rest, self.ended = after, self._left == 0
        return b"".join(out)
