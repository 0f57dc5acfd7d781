"""Who may come in: a bounded queue for each model, a bound on the bytes of all bodies, limits on each body. Knows no
engine; what is refused costs next to nothing, since nothing of it has been tokenized.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from .protocol import ApiError

MAX_DEPTH = 100
"""Of nested lists and objects."""
MAX_WAIT = 60
"""Seconds that Retry-After asks for at most."""


class Queue:
    """Places for completions of one model: those that run and those that may wait."""

    def __init__(self, max_sequences: int, max_queue: int) -> None:
        self.max_sequences, self.max_queue = max_sequences, max_queue
        self.taken = 0
        self._seconds = 1.0

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold places for a request's completions. Raises ApiError, 429, if there are too few.

        A request that is larger than the queue comes in if it is alone.
        """
        if self.taken and self.taken + count > self.max_sequences + self.max_queue:
            wait = self.retry_after
            raise ApiError(
                429, f"{self.taken} completions run or wait already; try again in {wait} s", code="queue_full",
                headers={"Retry-After": str(wait)},
            )  # fmt: skip
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count

    def note(self, seconds: float) -> None:
        """A request took so long."""
        self._seconds += 0.2 * (seconds - self._seconds)

    @property
    def retry_after(self) -> int:
        """Seconds until about half of what waits has been served."""
        waves = max(0, self.taken - self.max_sequences) / 2 / self.max_sequences
        return max(1, min(MAX_WAIT, math.ceil(waves * self._seconds)))


class Bodies:
    """Reads the bodies of requests: JSON, of bounded size, in bounded time, not too many bytes at once."""

    def __init__(self, max_bytes: int, max_total: int, seconds: float) -> None:
        self.max_bytes, self.max_total, self.seconds = max_bytes, max_total, seconds
        self.held = 0

    @contextmanager
    def room(self, request: Request) -> Iterator[_Body]:
        """A body on its way. Its bytes count until this ends."""
        body = _Body(self, request)
        try:
            yield body
        finally:
            self.held -= body.counted


class _Body:
    def __init__(self, bodies: Bodies, request: Request) -> None:
        self._bodies, self._request = bodies, request
        self.counted = 0

    async def json(self) -> Any:
        """The parsed body. Raises ApiError: 400, 408, 413, 415, 503."""
        data = await self.read()
        return await asyncio.to_thread(parsed, data) if len(data) > 1 << 16 else parsed(data)

    async def read(self) -> bytes:
        """A body that is JSON by its content type. Raises ApiError: 408, 413, 415, 503."""
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no page of another site can send without asking first
            raise ApiError(415, f"the content type is {kind or 'missing'!r:.80}, expected application/json")
        length = self._request.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20:
            self._count(int(length), 0)
        try:
            async with asyncio.timeout(self._bodies.seconds):
                return await self._read()
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._bodies.seconds:g} s", headers={"Connection": "close"}
            ) from None

    async def _read(self) -> bytes:
        data = bytearray()
        async for piece in self._request.stream():
            data += piece
            self._count(len(data), len(data))
        return bytes(data)

    def _count(self, announced: int, held: int) -> None:
        """See whether a body of this length may be held, and count what is."""
        bodies = self._bodies
        if announced > bodies.max_bytes:
            message = f"the body has more than {bodies.max_bytes:,} bytes"
            raise ApiError(413, message, code="request_too_large")
        if bodies.held - self.counted + announced > bodies.max_total:
            raise ApiError(503, "too many large requests at once", headers={"Retry-After": "1"})
        bodies.held += held - self.counted
        self.counted = held


def parsed(data: bytes) -> Any:
    """JSON. Raises ApiError, 400."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # not JSON, not UTF-8, or a number with thousands of digits
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise _too_deep()
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return value


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
