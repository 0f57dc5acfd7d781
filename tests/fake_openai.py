"""A small OpenAI-compatible server for tests: it answers as it is told to, right or wrong, and keeps what it was asked.

A token is a word. It runs in a thread of its own on a free port of the loopback.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeServer:
    """What it does; a test changes the fields while it runs."""

    url: str = ""
    models: tuple[str, ...] = ("fake",)
    key: str | None = None
    overhead: int = 0
    """Tokens that it adds to every prompt."""
    usage: bool = True
    tokenizer: bool = False
    per_piece: int = 1
    """Tokens in one piece of a stream."""
    delay: float = 0.0
    """Seconds before each piece."""
    status: int = 200
    every: int = 1
    """Only each so-manieth request fails with `status`, or is cut."""
    cut_after: int | None = None
    """Pieces after which the connection is dropped."""
    error_after: int | None = None
    """Pieces after which an error comes in the stream."""
    logprob: float | None = None
    """Of every token of a prompt that is to be echoed; None: it knows no echo."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests for streams."""
    most: int = 0
    """Most streams under way at a time."""
    _now: int = 0

    async def listed(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        return JSONResponse({"data": [{"id": name, "owned_by": "fakes"} for name in self.models]})

    async def tokenize(self, request: Request) -> Response:
        if not self.tokenizer:
            return JSONResponse({"error": "no such route"}, 404)
        words = (await request.json())["prompt"].split()
        return JSONResponse({"tokens": list(range(len(words)))})

    async def generate(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        used = {"prompt_tokens": len(text_of(body).split()) + self.overhead, "completion_tokens": body["max_tokens"]}
        if body.get("echo") and self.logprob is not None:
            told = [None, *[self.logprob] * (used["prompt_tokens"] - 1), -1.0]
            return JSONResponse({"choices": [{"logprobs": {"token_logprobs": told}}]})
        if not body.get("stream"):
            return JSONResponse({"choices": [], **({"usage": used} if self.usage else {})})
        self.asked.append(body)
        if self.status != 200 and len(self.asked) % self.every == 0:
            return JSONResponse({"error": {"message": "too many\nrequests"}}, self.status)
        wrong = len(self.asked) % self.every == 0
        return StreamingResponse(self._stream(body, used, wrong), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], used: dict[str, int], wrong: bool) -> AsyncIterator[str]:
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            if "messages" in body:
                yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for i in range(0, body["max_tokens"], self.per_piece):
                await asyncio.sleep(self.delay)
                if wrong and self.cut_after is not None and i >= self.cut_after:
                    raise ConnectionAbortedError
                if wrong and self.error_after is not None and i >= self.error_after:
                    yield event({"error": {"message": "the engine died"}})
                    return
                last = i + self.per_piece >= body["max_tokens"]
                said = {"delta": {"content": "word "}} if "messages" in body else {"text": "word "}
                yield event({"choices": [{**said, "finish_reason": "length" if last else None}]})
            if self.usage and body.get("stream_options", {}).get("include_usage"):
                yield event({"choices": [], "usage": used})
            yield "data: [DONE]\n\n"
        finally:
            self._now -= 1

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "wrong key"}}, 401)


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def text_of(body: dict[str, Any]) -> str:
    """All text of a request's prompt."""
    if "prompt" in body:
        return str(body["prompt"])
    return " ".join(message["content"] for message in body["messages"])


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A server that runs until the block ends."""
    fake = FakeServer()
    routes = [
        Route("/v1/models", fake.listed),
        Route("/tokenize", fake.tokenize, methods=["POST"]),
        Route("/v1/completions", fake.generate, methods=["POST"]),
        Route("/v1/chat/completions", fake.generate, methods=["POST"]),
    ]
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=10)
        listener.close()
