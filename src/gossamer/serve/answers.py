"""From an engine's outputs to the JSON of an answer, whole or chunk by chunk. Knows no HTTP and no engine process.

A form (`ChatForm`, `CompletionForm`) takes outputs one by one; each gives the chunks that a stream sends, and the form
keeps what the whole answer needs. So both ways of answering go through the same code.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..checkpoint import Tokenizer
from ..engine.sequence import EngineStats, Output, TokenLogprobs
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest
from .tools import Call, Finder

IMPOSSIBLE = -9999.0


class Clock:
    """When things happened to one request, and what it used; tells the metrics as it goes."""

    def __init__(self, model: str, metrics: Metrics, arrival: float) -> None:
        self.model, self.metrics, self.arrival = model, metrics, arrival
        self.first: float | None = None
        self.last = 0.0
        self.prompt_tokens = self.completion_tokens = self._first_tokens = 0
        self.unfinished = 0
        self._latest: dict[int, float] = {}
        self._cached: dict[int, int] = {}
        self._before = self._after = EngineStats()

    def begin(self, prompts: Sequence[Sequence[int]], choices: int, stats: EngineStats) -> None:
        """The engine has the prompts, each to be answered so many times."""
        self.prompt_tokens = sum(map(len, prompts))
        self.unfinished = len(prompts) * choices
        self._before = self._after = stats

    def started(self) -> None:
        self.metrics.started(self.model, time.monotonic() - self.arrival)

    def take(self, index: int, prompt: int, output: Output, stats: EngineStats) -> None:
        """An output of the choice with this index, of the prompt with that number."""
        now, count = time.monotonic(), len(output.tokens)
        if self.first is None:
            self.first, self._first_tokens = now, count
        if index in self._latest:
            self.metrics.tokens(self.model, count, now - self._latest[index])
        else:
            self.metrics.first_token(self.model, now - self.arrival)
        self._latest[index] = self.last = now
        self.completion_tokens += count
        self._cached[prompt] = min(self._cached.get(prompt, output.cached_tokens), output.cached_tokens)
        self._after = stats
        if output.finish_reason is not None:
            self.unfinished -= 1
            self.metrics.finished(self.model, output.finish_reason)

    def end(self) -> None:
        """Nothing more will come, be it that all has come or that nobody waits for it."""
        for _ in range(self.unfinished):
            self.metrics.finished(self.model, "abort")
        self.unfinished = 0
        self.metrics.ended(self.model, time.monotonic() - self.arrival)

    def usage(self) -> dict[str, Any]:
        """The `usage` of the answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "gossamer": {
                "ttft_s": None if self.first is None else round(self.first - self.arrival, 6),
                "tokens_per_s": self._speed(),
                "acceptance_rate": self._acceptance(),
            },
        }

    def _speed(self) -> float | None:
        if self.first is None or self.last <= self.first:
            return None
        return round((self.completion_tokens - self._first_tokens) / (self.last - self.first), 3)

    def _acceptance(self) -> float | None:
        """Of the engine while this request ran: other requests of that time are counted too."""
        drafted = self._after.drafted_tokens - self._before.drafted_tokens
        accepted = self._after.accepted_tokens - self._before.accepted_tokens
        return round(accepted / drafted, 4) if drafted > 0 else None


class ChatForm:
    """Answers of /v1/chat/completions."""

    kind: Literal["chat.completion"] = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, tokenizer: Tokenizer, enforced: bool) -> None:
        """`enforced`: the answer is a tool call, by its grammar."""
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        parse = bool(request.tools) and request.tool_choice != "none"
        count = request.n or 1
        self._choices = [_ChatChoice(i, tokenizer, Finder(enforced) if parse else None) for i in range(count)]

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for choice in self._choices:
            yield choice.chunk({"role": "assistant", "content": ""})

    def take(self, index: int, output: Output) -> Iterator[dict[str, Any]]:
        return self._choices[index].take(output)

    def choices(self) -> list[dict[str, Any]]:
        return [choice.whole() for choice in self._choices]


class _ChatChoice:
    def __init__(self, index: int, tokenizer: Tokenizer, finder: Finder | None) -> None:
        self._index, self._tokenizer, self._finder = index, tokenizer, finder
        self._text = ""
        self._calls: list[Call] = []
        self._logprobs: list[dict[str, Any]] | None = None
        self._finish: str | None = None
        self._stop: str | int | None = None

    def take(self, output: Output) -> Iterator[dict[str, Any]]:
        shown, calls = self._found(output)
        self._text += shown
        told = [self._logprob(t.id, t.logprobs) for t in output.tokens if t.logprobs is not None]
        if told:
            self._logprobs = (self._logprobs or []) + told
        if shown or told:
            yield self.chunk({"content": shown}, {"content": told} if told else None)
        for call in calls:
            yield self.chunk({"tool_calls": [{"index": len(self._calls), **_call(call)}]})
            self._calls.append(call)
        if output.finish_reason is not None:
            ended = output.finish_reason
            self._finish = "tool_calls" if self._calls and ended == "stop" else ended
            self._stop = output.stop_reason
            yield self.chunk({}, finish=self._finish, stop=self._stop)

    def chunk(
        self,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        stop: str | int | None = None,
    ) -> dict[str, Any]:
        return {
            "index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._text}
        if self._calls:
            message |= {"content": self._text or None, "tool_calls": [_call(call) for call in self._calls]}
        return {
            "index": self._index,
            "message": message,
            "logprobs": None if self._logprobs is None else {"content": self._logprobs},
            "finish_reason": self._finish,
            "stop_reason": self._stop,
        }

    def _found(self, output: Output) -> tuple[str, list[Call]]:
        """Text to show and calls."""
        text = "".join(token.text for token in output.tokens)
        if self._finder is None:
            return text, []
        shown, calls = self._finder.push(text)
        if output.finish_reason is not None:
            rest, last = self._finder.flush()
            return shown + rest, calls + last
        return shown, calls

    def _logprob(self, token: int, said: TokenLogprobs) -> dict[str, Any]:
        top = [_token(self._tokenizer, other, logprob) for other, logprob in said.top]
        return {**_token(self._tokenizer, token, said.logprob), "top_logprobs": top}


class CompletionForm:
    """Answers of /v1/completions."""

    kind: Literal["text_completion"] = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self, request: CompletionRequest, tokenizer: Tokenizer, texts: Sequence[str], prompts: Sequence[Sequence[int]]
    ) -> None:
        """`texts`: what an echo repeats, for each of the prompts (token ids)."""
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self._choices = [
            _Completion(p * (request.n or 1) + i, request, tokenizer, text, tokens)
            for p, (text, tokens) in enumerate(zip(texts, prompts, strict=True))
            for i in range(request.n or 1)
        ]

    def opening(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def take(self, index: int, output: Output) -> Iterator[dict[str, Any]]:
        return self._choices[index].take(output)

    def choices(self) -> list[dict[str, Any]]:
        return [choice.whole() for choice in self._choices]


class _Completion:
    def __init__(
        self, index: int, request: CompletionRequest, tokenizer: Tokenizer, text: str, prompt: Sequence[int]
    ) -> None:
        self._index, self._request, self._tokenizer = index, request, tokenizer
        self._echo, self._prompt = text, prompt
        self._text = ""
        self._begun = False
        self._told: dict[str, list[Any]] | None = None
        self._prompt_logprobs: list[Any] | None = None
        self._finish: str | None = None
        self._stop: str | int | None = None

    def take(self, output: Output) -> Iterator[dict[str, Any]]:
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        text, extra = "", dict[str, Any]()
        if not self._begun:
            self._begun = True
            text += self._begin(output, told)
            if self._prompt_logprobs is not None:
                extra["prompt_logprobs"] = self._prompt_logprobs
        for token in output.tokens:
            if token.logprobs is not None:
                self._tell(told, token.id, token.logprobs, len(self._text) + len(text))
            text += token.text
        self._text += text
        logprobs = told if self._request.logprobs is not None else None
        if logprobs is not None:
            kept = self._told or {name: [] for name in told}
            self._told = {name: kept[name] + told[name] for name in told}
        self._finish, self._stop = output.finish_reason, output.stop_reason
        if text or extra or (logprobs is not None and told["tokens"]) or self._finish is not None:
            yield {
                "index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self._finish,
                "stop_reason": self._stop, **extra,
            }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        choice = {
            "index": self._index, "text": self._text, "logprobs": self._told, "finish_reason": self._finish,
            "stop_reason": self._stop,
        }  # fmt: skip
        if self._prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs
        return choice

    def _begin(self, output: Output, told: dict[str, list[Any]]) -> str:
        """What comes before the answer: the prompt, if it is to be repeated."""
        said = output.prompt_logprobs
        if said is not None and self._request.prompt_logprobs is not None:
            most = self._request.prompt_logprobs
            self._prompt_logprobs = [self._by_id(t, lp, most) for t, lp in zip(self._prompt, said, strict=True)]
        if not self._request.echo:
            return ""
        if said is not None and self._request.logprobs is not None:
            stream, offset = self._tokenizer.stream(), 0
            for token, logprobs in zip(self._prompt, said, strict=True):
                self._tell(told, token, logprobs, offset)
                offset += len(stream.push(token))
        return self._echo

    def _tell(self, told: dict[str, list[Any]], token: int, said: TokenLogprobs | None, offset: int) -> None:
        text = _text(self._tokenizer, token)
        told["tokens"].append(text)
        told["text_offset"].append(offset)
        told["token_logprobs"].append(None if said is None else _finite(said.logprob))
        if said is None:
            told["top_logprobs"].append(None)
            return
        likeliest = said.top[: self._request.logprobs]
        told["top_logprobs"].append(
            {text: _finite(said.logprob)} | {_text(self._tokenizer, t): _finite(lp) for t, lp in reversed(likeliest)}
        )

    def _by_id(self, token: int, said: TokenLogprobs | None, most: int) -> dict[str, Any] | None:
        if said is None:
            return None
        rows = {token: said.logprob, **dict(said.top[:most])}
        return {str(t): {"logprob": _finite(lp), "decoded_token": _text(self._tokenizer, t)} for t, lp in rows.items()}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special=False)


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = _text(tokenizer, token)
    known = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text of its own
    return {"token": text, "logprob": _finite(logprob), "bytes": known}


def _finite(logprob: float) -> float:
    """JSON has no infinity: what is impossible is so unlikely."""
    return max(logprob, IMPOSSIBLE)
