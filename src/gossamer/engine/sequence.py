"""One request on its way: its tokens, its text so far, and when it ends. Knows no torch and no model."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal, Protocol

from .params import SamplingParams

FinishReason = Literal["stop", "length"]


class TextStream(Protocol):
    """Tokens to text, piece by piece, never a broken character."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class Token:
    """One generated token, and the text that it released (often none: of a stop text, nothing is ever shown)."""

    text: str
    id: int
    finish_reason: FinishReason | None = None
    """`stop`: an end token or a stop text; `length`: max_tokens or the model's context; None: more will come."""


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    text: str
    tokens: tuple[int, ...]
    """Generated tokens, an end token or the tokens of a stop text included."""
    finish_reason: FinishReason
    prompt_tokens: int


class Sequence:
    """A prompt and what is generated after it."""

    def __init__(
        self, prompt: Many[int], params: SamplingParams, limit: int, eos_ids: Collection[int], stream: TextStream
    ) -> None:
        self.prompt = list(prompt)
        self.params = params
        self.limit = limit
        """Most tokens to generate: max_tokens, or what the context has left."""
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._eos_ids, self._stream, self._stops = eos_ids, stream, StopText(params.stop)

    @property
    def may_stop(self) -> bool:
        """True if the next token may end it: as an end token, or by completing a stop text."""
        return len(self.tokens) >= self.params.min_tokens

    def push(self, token: int) -> Token:
        """Append a sampled token; says what text it released and whether the sequence ends with it."""
        may_stop = self.may_stop
        self.tokens.append(token)
        if token in self._eos_ids and may_stop and not self.params.ignore_eos:
            self.finish_reason = "stop"
            text = self._stops.push(self._stream.flush())[0]
            return self._released(text + self._stops.flush(), token)
        text, stopped = self._stops.push(self._stream.push(token), may_stop)
        if stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            rest, stopped = self._stops.push(self._stream.flush(), may_stop)
            text += rest + self._stops.flush()  # of a stop text that was found, nothing is held
            self.finish_reason = "stop" if stopped else "length"
        return self._released(text, token)

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(self.text, tuple(self.tokens), self.finish_reason, len(self.prompt))

    def _released(self, text: str, token: int) -> Token:
        self.text += text
        return Token(text, token, self.finish_reason)


class StopText:
    """Finds stop texts in text that comes in pieces, and holds back whatever might be the beginning of one."""

    def __init__(self, stops: Many[str]) -> None:
        self.stops = tuple(stops)
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop text was found (it and what follows are dropped)."""
        if not may_stop:
            return self.flush() + text, False
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self.stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, once nothing more can follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
