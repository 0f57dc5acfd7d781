"""One completion on its way: its tokens, its text so far, when it ends, and what a step says of it. Knows no torch and
no model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal, Protocol

from .block_manager import BlockTable
from .params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


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
    """`stop`: an end token or stop text; `length`: max_tokens or the model's context; `abort`; None: more will come."""
    logprobs: TokenLogprobs | None = None
    """Where the request asked for them."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one token, in the model's own distribution."""

    logprob: float
    """Of the token itself."""
    top: tuple[tuple[int, float], ...] = ()
    """Token ids and log-probabilities of the likeliest, the likeliest first."""


@dataclass(frozen=True)
class Output:
    """What one engine step gave to one choice of one request."""

    request_id: str
    choice: int
    """Which of the request's n completions."""
    tokens: tuple[Token, ...]
    """In order; several where a draft was accepted, none if only `error` is told. The last may have a finish_reason."""
    finish_reason: FinishReason | None = None
    """Not None: nothing more will come for this choice."""
    stop_reason: str | int | None = None
    """The stop text or the token that ended it, if one of the request's own did."""
    error: str | None = None
    """Why it could not go on (finish_reason is then `abort`)."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """With the first output of a request that asked for them: one for each token of the prompt, None for the first."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine; the counters only grow."""

    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    """Held by requests; blocks that are only kept for reuse are free."""
    preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens that were looked up for reuse, and found: `prefix_hits`."""
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speculating: bool = False
    """True while drafts are made: they are off while they would be slower."""


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    text: str
    tokens: tuple[int, ...]
    """Generated tokens, an end token or the tokens of a stop text included."""
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One for each token, where the request asked for them."""


class Sequence:
    """A prompt and what is generated after it: text and end on one side, its place in the KV cache on the other."""

    def __init__(
        self,
        prompt: Many[int],
        params: SamplingParams,
        limit: int,
        eos_ids: Collection[int],
        stream: TextStream,
        *,
        request_id: str = "",
        choice: int = 0,
        seed: int = 0,
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.ids = list(prompt)
        """The prompt's tokens and then the generated ones."""
        self.params = params
        self.request_id, self.choice, self.seed = request_id, choice, seed
        self.limit = limit
        """Most tokens to generate: max_tokens, or what the context has left."""
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._eos_ids, self._stream, self._stops = eos_ids, stream, StopText(params.stop)
        # The scheduler's: where its keys and values are, and what is to come.
        self.turn = (0, 0)
        """Its place: tokens of the engine's work after which it would have been read alone, and its number."""
        self.table = BlockTable()
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.digests: list[bytes] = []
        """Of the full blocks of the prompt."""
        self.cached_tokens: int | None = None
        """Prompt tokens that were in the cache when it was first admitted; None: not yet."""
        self.drafts: list[int] = []
        """Tokens that are guessed to come next."""
        self.prompt_logprobs: list[TokenLogprobs | None] = []

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.prompt_tokens]

    @property
    def tokens(self) -> list[int]:
        """Generated tokens."""
        return self.ids[self.prompt_tokens :]

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.ids) - self.computed

    @property
    def decodes(self) -> bool:
        """True while its answer goes on token by token; else a prompt, or what was preempted, is to be read."""
        return self.missing == 1 and self.generated > 0

    @property
    def may_stop(self) -> bool:
        """True if the next token may end it: as an end token, or by completing a stop text."""
        return self.generated >= self.params.min_tokens

    @property
    def wants_likeliest(self) -> bool:
        """True if its next token is the model's own likeliest one, whatever that is."""
        return self.params.plain and (self.may_stop or next(self.end_ids, None) is None)

    @property
    def end_ids(self) -> Iterator[int]:
        """Tokens that end it."""
        if not self.params.ignore_eos:
            yield from self._eos_ids
        yield from self.params.stop_token_ids

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> Token:
        """Append a sampled token; says what text it released and whether the sequence ends with it."""
        may_stop = self.may_stop
        self.ids.append(token)
        if may_stop and token in self.end_ids:
            self.finish_reason = "stop"
            if token in self.params.stop_token_ids:
                self.stop_reason = token
            text = self._stops.push(self._stream.flush())[0]
            return self._released(text + self._stops.flush(), token, logprobs)
        text, stopped = self._stops.push(self._stream.push(token), may_stop)
        if not stopped and self.generated >= self.limit:
            rest, stopped = self._stops.push(self._stream.flush(), may_stop)
            text += rest + self._stops.flush()  # of a stop text that was found, nothing is held
            self.finish_reason = "length"
        if stopped:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        return self._released(text, token, logprobs)

    def completion(self) -> Completion:
        assert self.finish_reason in ("stop", "length")
        return Completion(self.text, tuple(self.tokens), self.finish_reason, self.prompt_tokens)

    def _released(self, text: str, token: int, logprobs: TokenLogprobs | None) -> Token:
        self.text += text
        return Token(text, token, self.finish_reason, logprobs)


class StopText:
    """Finds stop texts in text that comes in pieces, and holds back whatever might be the beginning of one."""

    def __init__(self, stops: Many[str]) -> None:
        self.stops = tuple(stops)
        self.found: str | None = None
        """The stop text that was found."""
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop text was found (it and what follows are dropped)."""
        if not may_stop:
            return self.flush() + text, False
        held = self._held + text
        found = [(at, stop) for at, stop in ((held.find(stop), stop) for stop in self.stops) if at >= 0]
        if found:
            at, self.found = min(found)
            self._held = ""
            return held[:at], True
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
