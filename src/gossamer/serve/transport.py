"""HTTP below the routes: JSON and event streams, clients that go away, the API key. Knows no engine and no request's
meaning."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, ClassVar, TypeVar

import h11
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .protocol import ApiError

T = TypeVar("T")
OPEN_PATHS = {"/health"}
"""What needs no key."""
SECONDS_FOR_LAST_BYTES = 10.0


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class JSONAnswer(Response):
    """A JSON body. Text that is no Unicode (half a surrogate pair, sent back in an error) becomes question marks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return as_json(content)


def as_json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def refused(error: ApiError) -> JSONAnswer:
    return JSONAnswer(error.body(), error.status, error.headers)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """The result of `work`, which is cancelled if the client goes away (ClientGone) or time is up (TimeoutError).

    The body must have been read: what is received next can only be the end.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientGone if gone in done else TimeoutError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, until they end, the client goes away or time is up; `close` is called in any case.

    What the events raise as ApiError becomes a last event, and no `[DONE]` follows.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[Any], close: Callable[[], None], seconds: float, whole: Callable[[], None]
    ) -> None:
        """`whole`: called once everything was sent."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._seconds, self._whole = events, close, seconds, whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        began = time.monotonic()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = b"data: [DONE]\n\n"
            try:
                await while_connected(receive, self._send_all(put), self._seconds)
                self._whole()
            except ApiError as error:
                last = as_event(error.body())
            except TimeoutError:
                last = as_event(ApiError(504, f"not answered within {self._seconds:g} s").body())
            self._close()  # now, and not when a slow client has taken the last bytes
            left = began + self._seconds - time.monotonic()
            async with asyncio.timeout(max(left, SECONDS_FOR_LAST_BYTES)):
                await put(last, more=False)
        except (ClientGone, TimeoutError):
            pass
        finally:
            self._close()

    async def _send_all(self, put: Callable[[bytes], Awaitable[None]]) -> None:
        async for event in self._events:
            await put(as_event(event))


def as_event(value: Any) -> bytes:
    return b"data: " + as_json(value) + b"\n\n"


class Guard:
    """Answers 401 to whoever has not the key, before anything else is looked at; and 503 to everybody once `closed`.

    The key comes as `Authorization: Bearer KEY`, or as the password of `Basic`, which browsers ask for by themselves.
    """

    def __init__(self, app: ASGIApp, key: str | None, closed: Callable[[], bool]) -> None:
        self._app, self._closed = app, closed
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._key is not None and not self._is_key(headers.get(b"authorization", b"")):
            scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="gossamer", charset="UTF-8"'
            error = ApiError(
                401, "a valid API key is needed", code="invalid_api_key", headers={"WWW-Authenticate": scheme}
            )
            await refused(error)(scope, receive, send)
        elif self._closed() and scope["method"] == "POST":
            await refused(shutting_down())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_key(self, said: bytes) -> bool:
        assert self._key is not None
        scheme, _, value = said.partition(b" ")
        value = value.strip()
        if scheme.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(value, self._key)


class PatientProtocol(H11Protocol):
    """A connection that is closed if a request's head does not come in time; uvicorn by itself waits for ever."""

    seconds: ClassVar[float] = 30.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._look(lost=True)

    def _look(self, lost: bool = False) -> None:
        """Set the alarm while a head is awaited, and turn it off when it is there."""
        waits = self.conn.their_state is h11.IDLE and not lost
        if waits and self._late is None:
            self._late = self.loop.call_later(self.seconds, self.transport.close)
        elif not waits and self._late is not None:
            self._late.cancel()
            self._late = None


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", headers={"Retry-After": "10"})
