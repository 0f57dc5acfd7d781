"""The HTTP side of replicas: takes requests in, has one replica answer each, and another one where that is lost.

Nothing of an answer is passed on before it says something, so that until then any replica can begin it anew. What
breaks off later ends with an error: a stream with an event, as one that loses its engine. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from hashlib import blake2b
from itertools import takewhile
from typing import Any, TypeAlias

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..admission import Bodies, parsed
from ..protocol import ApiError
from ..service import Limits
from ..transport import ClientGone, Guard, JSONAnswer, as_event, refused, shutting_down, while_connected
from .metrics import merged

SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
"""What a replica is told of a request besides its headers."""
KEPT_BACK = {b"authorization", b"cookie"}
"""Headers that are none of a replica's business."""
BEGINNING = 1024
"""Characters, or tokens, of a text by which its replica is chosen."""
OPENING = b'"delta":{"role":'
"""In the first events of a conversation, which say nothing of the answer yet."""
SECONDS_TO_CHECK = 10.0
SECONDS_OF_GRACE = 10.0
"""A replica ends a request that takes too long; so much later the front does."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between tries."""


class ReplicaLost(Exception):
    """The replica that was asked is gone, or there is none."""


Ask: TypeAlias = Callable[[Scope, bytes, str], AsyncGenerator[list[Message], None]]
"""(scope, body, what a replica is chosen by) -> what it sends. Raises ReplicaLost."""
Gather: TypeAlias = Callable[[], Awaitable[list[tuple[str, bytes]]]]
"""The name of each replica and its metrics, of those that answer in time."""


class Front:
    """An ASGI application over replicas."""

    def __init__(self, ask: Ask, gather: Gather, limits: Limits, api_key: str | None) -> None:
        self.draining = False
        self.in_flight = 0
        self.retried = 0
        """Requests that another replica was asked for."""
        self._ask, self._gather, self._limits = ask, gather, limits
        self._bodies = Bodies(limits.max_body, max(limits.max_bodies, limits.max_body), limits.body_seconds)
        self.app: ASGIApp = Guard(self._answer, api_key, closed=lambda: self.draining)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        self.in_flight += 1
        try:
            if scope["path"] == "/health":
                await self._health(scope, receive, send)
                return
            if scope["path"] == "/metrics":
                text = merged(await self._gather(), self.retried)
                await Response(text, media_type=CONTENT_TYPE_LATEST)(scope, receive, send)
                return
            with self._bodies.room(request) as taken:
                body = await taken.read() if scope["method"] == "POST" else b""
            seconds = self._limits.request_seconds + SECONDS_OF_GRACE
            await while_connected(receive, self._pass_on(_told(scope), body, send, seconds))
        except (ClientGone, ClientDisconnect):
            pass
        except ApiError as error:
            await refused(error)(scope, receive, send)
        finally:
            self.in_flight -= 1

    async def _pass_on(self, scope: Scope, body: bytes, send: Send, seconds: float) -> None:
        """Have replicas answer, one after another, until one does. Raises ApiError if none began in time."""
        chosen_by = beginning(body)
        answer = _Answer(send)
        pause, tries = FIRST_PAUSE, 0
        try:
            async with asyncio.timeout(seconds):
                while not await self._one(scope, body, f"{chosen_by}/{tries}" if tries else chosen_by, answer):
                    tries += 1
                    self.retried += tries == 1
                    answer.forget()
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except TimeoutError:
            await answer.fail(ApiError(504, f"not answered within {seconds:g} s"))

    async def _one(self, scope: Scope, body: bytes, chosen_by: str, answer: _Answer) -> bool:
        """Have one replica answer; False if nothing of its answer has been passed on."""
        try:
            async with aclosing(self._ask(scope, body, chosen_by)) as replies:
                async for messages in replies:
                    for message in messages:
                        await answer.take(message)
        except ReplicaLost as lost:
            if answer.begun:
                await answer.fail(ApiError(503, str(lost), code="engine_lost"))
        return answer.begun

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 while a replica can answer."""
        try:
            if self.draining:
                raise shutting_down()
            await self._pass_on(_told(scope), b"", send, SECONDS_TO_CHECK)
        except ApiError:
            status = "draining" if self.draining else "unavailable"
            await JSONAnswer({"status": status, "models": {}}, 503)(scope, receive, send)


class _Answer:
    """What a replica sends, on its way to the client."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        """Something was passed on: no other replica can answer any more."""
        self._send = send
        self._held: list[Message] = []
        self._is_stream = False

    async def take(self, message: Message) -> None:
        if not self.begun:
            self._held.append(message)
            opens = message.get("more_body", False) and OPENING in message["body"]
            if message["type"] == "http.response.start" or opens:
                return
            if self._held[0]["status"] == 503:  # it has no engine at the moment
                raise ReplicaLost("the engine is being restarted")
            self._is_stream = _is_stream(self._held[0])
            self.begun = True
            for held in self._held:
                await self._send(held)
        else:
            await self._send(message)

    def forget(self) -> None:
        """What was held back is worth nothing any more."""
        self._held.clear()

    async def fail(self, error: ApiError) -> None:
        """End a stream with an error; raises the error if nothing has begun, ClientGone if only hanging up is left."""
        if not self.begun:
            raise error
        if not self._is_stream:
            raise ClientGone
        await self._send({"type": "http.response.body", "body": as_event(error.body()), "more_body": False})


def beginning(body: bytes) -> str:
    """What a prompt goes to a replica by; "" for what has no prompt.

    Of a conversation this is what stands up to its first answer, so that all of its turns go to one replica, while
    others that share nothing but the system's words go to any. Raises ApiError for what is no JSON.
    """
    if not body:
        return ""
    request = parsed(body)
    if not isinstance(request, Mapping):
        return ""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        prompt = prompt[0]  # of several, the first
    if isinstance(prompt, list | str):
        prompt = prompt[:BEGINNING]
    if isinstance(messages := request.get("messages"), list):
        prompt = list(takewhile(lambda message: not _is_answer(message), messages))
    if not prompt:
        return ""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return blake2b(f"{request.get('model')}\n{text}".encode("utf-8", "replace"), digest_size=16).hexdigest()


def _is_answer(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _told(scope: Scope) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name not in KEPT_BACK]
    return {key: scope[key] for key in SCOPE if key in scope} | {"headers": headers, "client": None, "server": None}


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and b"event-stream" in value for name, value in start["headers"])
