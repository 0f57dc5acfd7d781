"""What the pieces of a response say: when text arrived, how many tokens it was, or why there is no answer.

Reads Server-Sent Events as OpenAI's API sends them, for chats and for completions. Knows no network and no clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .stats import Answer
from .wire import Exchange, read_body

LONGEST_REASON = 160
"""Characters of a server's message that a reason keeps."""


def read_answer(got: Exchange) -> Answer:
    """The answer in what came back. One that is not whole has an error and nothing else."""
    body = read_body([data for _, data in got.pieces])
    if got.error is None and body.status not in (0, 200):
        return Answer(error=f"HTTP {body.status}: {_message(b''.join(body.parts))}")
    times = [moment - got.sent for moment, _ in got.pieces]
    stream = _Stream()
    for moment, text in events(list(zip(times, body.parts, strict=True))):
        stream.take(moment, text)
    error = got.error or stream.error or stream.missing(bool(got.pieces), body.complete)
    return Answer(error=error) if error is not None else stream.answer()


def events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """The data of each event, with the moment at which its last byte arrived."""
    rest = b""
    for moment, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield moment, line[5:].strip().decode("utf-8", errors="replace")


class _Stream:
    """The events of one answer, as they are read."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.last, self.events = 0.0, 0
        self.finished = False
        self.error: str | None = None
        self.usage: dict[str, Any] | None = None

    def take(self, moment: float, text: str) -> None:
        """Read one event; what is no JSON object is an error of the server."""
        if text == "[DONE]":
            self.finished = True
            return
        self.events += 1
        try:
            event = json.loads(text)
            choices = event.get("choices") or []
        except (ValueError, AttributeError):
            self.error = self.error or f"stream: an event that is no JSON object: {text[:40]!r}"
            return
        if event.get("error"):
            self.error = self.error or f"stream: {_message(text.encode())}"
        self.usage = event.get("usage") or self.usage
        for choice in choices:
            self.last = moment
            self.finished = self.finished or choice.get("finish_reason") is not None
            if _has_text(choice):
                self.arrivals.append(moment)

    def missing(self, anything: bool, complete: bool) -> str | None:
        """What is missing in an answer that should be whole."""
        if not anything:
            return "connection: closed without an answer"
        if not complete or (self.events and not self.finished):
            return "stream: cut off before its end"
        return None if self.events else "stream: an answer without events"

    def answer(self) -> Answer:
        """The whole of it. The server's own count is taken where it has one: a piece may hold several tokens."""
        usage = self.usage or {}
        counted = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            arrivals=tuple(self.arrivals),
            e2e=self.last,
            output_tokens=len(self.arrivals) if counted is None else counted,
            prompt_tokens=usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            counted_by="chunks" if counted is None else "usage",
        )


def _has_text(choice: dict[str, Any]) -> bool:
    """True if a token came with it: not for the event that only names the role, which some servers send at once."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or any(delta.get(k) for k in ("content", "reasoning_content", "reasoning")))


def _message(body: bytes) -> str:
    """What a server says of an error, on one line."""
    text = body.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:LONGEST_REASON] or "no message"
