"""`gossamer chat`: a conversation on the terminal, or with lines piped into stdin."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..errors import EngineError, GossamerError
from . import _options as o
from ._console import print_error, remark
from .run import Answer, load, require_utf8, sampling_params, stdin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..engine import LLM, SamplingParams

HELP = "/reset forgets the conversation, /quit (or ctrl-D) ends it, ctrl-C stops an answer"


def chat(
    model: o.Model,
    max_tokens: o.MaxTokens = 512,
    temperature: o.Temperature = 0.7,
    top_p: o.TopP = 0.95,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
    weights: o.Weights = "stored",
    backend: o.Backend = "auto",
    activations: o.Activations = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Talk with a model; /help lists what else may be typed.

    \b
    gossamer chat smollm2
    """
    from ..checkpoint import open_checkpoint

    params = sampling_params(max_tokens, temperature, top_p, top_k, min_p, seed, stop)
    llm = load(open_checkpoint(model), weights, backend, activations, quiet, max_tokens)
    if llm.tokenizer.chat_template is None:
        raise EngineError(f"{model} has no chat template", hint="gossamer run continues a text without one")
    conversation = Conversation(llm, params)
    if not quiet:
        remark(f"{model}: {HELP}")
    for line in _lines(quiet):
        if line in {"/quit", "/exit"}:
            return
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            remark(HELP)
        elif line:
            _answer(conversation, line, quiet)


class Conversation:
    """Messages so far, of which the oldest are forgotten when the context would overflow."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.llm, self.params = llm, params
        self.messages: list[dict[str, str]] = []
        self._asked: list[dict[str, str]] = []
        """The messages with the question that waits for an answer; without one, nothing has changed."""

    def reset(self) -> None:
        self.messages = []

    def prompt(self, text: str) -> list[int]:
        """Tokens of the conversation with this question at its end. Raises EngineError if it alone is too long."""
        messages = [*self.messages, {"role": "user", "content": text}]
        limit = self.llm.config.max_positions
        room = min(self.params.max_tokens, limit // 4)
        tokens = self.llm.chat_tokens(messages)
        while len(tokens) > limit - room and len(messages) > 1:
            del messages[:2]  # a question and its answer
            tokens = self.llm.chat_tokens(messages)
        if len(tokens) >= limit:
            raise EngineError(f"the question has {len(tokens):,} tokens, the context of the model {limit:,}")
        self._asked = messages
        return tokens

    def answered(self, text: str) -> None:
        self.messages = [*self._asked, {"role": "assistant", "content": text}]


def _answer(conversation: Conversation, line: str, quiet: bool) -> None:
    """Stream one answer. Ctrl-C keeps what was said so far; after an error the question is as if never asked."""
    answer = Answer()
    try:
        tokens = conversation.prompt(require_utf8(line, "the question"))
        try:
            answer.follow(conversation.llm.stream(tokens, conversation.params))
        except KeyboardInterrupt:
            answer.finish_reason = "interrupted"
    except GossamerError as error:
        if answer.text:
            print(flush=True)
        print_error(error)
        return
    print(flush=True)
    conversation.answered(answer.text)
    if not quiet:
        remark(answer.summary(len(tokens)))


def _lines(quiet: bool) -> Iterator[str]:
    """Stripped lines of stdin, asked for with a prompt where someone is typing."""
    lines = stdin()
    typing = lines.isatty()
    if typing:
        import readline  # noqa: F401  # importing it gives input() its history and editing keys
    while True:
        try:
            line = _typed(quiet) if typing else lines.readline()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if not typing and not line:
            return
        yield line.strip()


def _typed(quiet: bool) -> str:
    """A line from the terminal; the prompt goes to stderr where stdout is a file, which is for answers alone."""
    if sys.stdout.isatty():
        return input("> ")
    if not quiet:
        print("> ", end="", file=sys.stderr, flush=True)
    return input()
