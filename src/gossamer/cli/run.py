"""`gossamer run`: one prompt, one answer, streamed to stdout."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..errors import EngineError, UsageError
from . import _options as o
from ._console import emit_json, log_remarks, progress, remark
from ._imports import importing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..checkpoint import Checkpoint, Tokenizer
    from ..engine import LLM, SamplingParams, Token
    from ..engine.backend import Activations, BackendName, Weights
    from ..engine.sharded.nodes import Nodes


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
    backend: o.Backend = "auto",
    activations: o.Activations = "auto",
    tp: o.TensorParallel = 1,
    pp: o.PipelineParallel = 1,
    nodes: o.NodeCount = 1,
    master_addr: o.MasterAddress = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer one prompt.

    \b
    gossamer run smollm2 "Why is the sky blue?"
    """
    from ..checkpoint import chat_template

    params = sampling_params(max_tokens, temperature, top_p, top_k, min_p, seed, stop)
    text = require_utf8(stdin().read() if prompt == "-" else prompt)
    if not text:
        raise UsageError("the prompt is empty", hint="gossamer run MODEL PROMPT, or - to read it from stdin")
    if not raw:
        chat_template.prepare()  # it starts while torch is imported, which takes a core for a second
    with importing():
        from ..checkpoint import open_checkpoint
        from ..engine import LLM  # noqa: F401  # which `load` takes
    meeting = o.several_nodes(nodes, master_addr)
    checkpoint = open_checkpoint(model)
    tokens = prompt_tokens(checkpoint.tokenizer(), text, raw)
    llm = load(checkpoint, weights, backend, activations, quiet, len(tokens) + max_tokens, tp, pp, meeting)
    answer = Answer()
    answer.follow(llm.stream(tokens, params), show=not json)
    if json:
        emit_json({"model": model, "prompt_tokens": len(tokens), **answer.record()})
    else:
        sys.stdout.write("\n")
        if not quiet:
            remark(answer.summary(len(tokens)))


def sampling_params(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int | None,
    stop: list[str] | None,
) -> SamplingParams:
    """What the command line asks for. Raises UsageError where the engine would refuse it."""
    from ..engine import SamplingParams

    stops = tuple(require_utf8(text, "a stop text") for text in stop or ())
    try:
        return SamplingParams(max_tokens, temperature, top_p, top_k, min_p, seed, stops)
    except EngineError as error:
        raise UsageError(error.message, hint=error.hint) from error


def stdin() -> TextIO:
    """stdin, with bytes that are no text kept as surrogates: `require_utf8` can then say so, and reading can go on."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def require_utf8(text: str, what: str = "the prompt") -> str:
    """The text itself. Raises UsageError if it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not UTF-8 at character {error.start + 1}", hint="iconv -f ENCODING -t UTF-8 converts a text"
        ) from error
    return text


def load(
    checkpoint: Checkpoint,
    weights: Weights,
    backend: BackendName,
    activations: Activations,
    quiet: bool,
    tokens: int,
    tp: int = 1,
    pp: int = 1,
    nodes: Nodes | None = None,
) -> LLM:
    """The model with room for a prompt and its answer of so many tokens, loaded under a progress bar. Raises as LLM.

    What the engine says of its choice of backend is a remark.
    """
    from ..engine import LLM

    with progress(quiet) as callback, log_remarks("gossamer.engine", quiet):
        return LLM(
            checkpoint,
            weights,
            backend=backend,
            activations=activations,
            reserve_tokens=tokens,
            progress=callback,
            tp=tp,
            pp=pp,
            nodes=nodes,
        )


def prompt_tokens(tokenizer: Tokenizer, text: str, raw: bool) -> list[int]:
    """Token ids of a prompt, in the model's chat template if it has one and `raw` is not asked for."""
    if raw or tokenizer.chat_template is None:
        return tokenizer.encode(text)
    return tokenizer.chat([{"role": "user", "content": text}])


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
