"""`gossamer run`: one prompt, one answer, streamed to stdout."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import _options as o
from ._console import emit_json, progress, remark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..engine import LLM, Token
    from ..engine.llm import Weights


def run(
    model: o.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question; - reads it from stdin.")],
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = 0.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt itself, without the chat template.")] = False,
    weights: o.Weights = "stored",
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer one prompt.

    \b
    gossamer run smollm2 "Why is the sky blue?"
    """
    from ..engine import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_p, top_k, min_p, seed, tuple(stop or ()))
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty", hint="gossamer run MODEL PROMPT, or - to read it from stdin")
    llm = load(model, weights, quiet)
    tokens = prompt_tokens(llm, text, raw)
    answer = Answer()
    answer.follow(llm.stream(tokens, params), show=not json)
    if json:
        emit_json({"model": model, "prompt_tokens": len(tokens), **answer.record()})
    else:
        sys.stdout.write("\n")
        if not quiet:
            remark(answer.summary(len(tokens)))


def load(model: str, weights: Weights, quiet: bool) -> LLM:
    """The model, loaded under a progress bar. Raises as LLM does."""
    from ..engine import LLM

    with progress(quiet) as callback:
        return LLM(model, weights, progress=callback)


def prompt_tokens(llm: LLM, text: str, raw: bool) -> list[int]:
    """Token ids of a prompt, in the model's chat template if it has one and `raw` is not asked for."""
    if raw or llm.tokenizer.chat_template is None:
        return llm.tokenizer.encode(text)
    return llm.chat_tokens([{"role": "user", "content": text}])


@dataclass
class Answer:
    """One answer as it arrives, and how quickly it did."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    ttft: float = 0.0
    """Seconds from the request to the first token."""
    decode: float = 0.0
    """Seconds from the first token to the last."""

    def follow(self, stream: Iterator[Token], show: bool = True) -> None:
        """Take in a stream to its end, and show it on stdout as it comes."""
        start = time.perf_counter()
        for token in stream:
            now = time.perf_counter()
            if not self.tokens:
                self.ttft = now - start
            self.decode = now - start - self.ttft
            self.tokens.append(token.id)
            self.text += token.text
            self.finish_reason = token.finish_reason
            if show and token.text:
                sys.stdout.write(token.text)
                sys.stdout.flush()

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, which takes two tokens to see."""
        return (len(self.tokens) - 1) / self.decode if self.decode > 0 else None

    def record(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "finish_reason": self.finish_reason,
            "ttft_s": round(self.ttft, 4),
            "decode_tokens_per_s": None if self.tokens_per_second is None else round(self.tokens_per_second, 2),
        }

    def summary(self, prompt: int) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.1f} tokens/s"
        return f"{prompt} + {len(self.tokens)} tokens, first after {self.ttft:.2f} s{speed} ({self.finish_reason})"
