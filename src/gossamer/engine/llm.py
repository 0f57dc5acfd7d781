"""The public face of the engine: a model by name, prompts in, text out. Knows no command line and no server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.load import resident_bytes
from ..checkpoint.memory import available_memory, require_memory
from ..errors import EngineError
from ..kernels import dispatch
from ..settings import threads
from .backend import Activations, BackendName, Progress, Weights, cache_bytes, choose, kv_bytes_per_token
from .engine import Engine, EngineOptions
from .params import SamplingParams
from .runner import KVPool, Rows
from .sampling import draw, require_finite, scaled
from .sequence import Completion, Output, Token
from .sharded.nodes import Nodes

Prompt: TypeAlias = "str | Many[int]"

MAX_BATCH = 32
BYTES_PER_LOGIT = 32
"""Four float32 numbers (logit, scaled, probability, a copy) and two float64 sums while a token is drawn."""
WAVE_BYTES = 1 << 30
"""Most bytes of KV cache that sampling a model's own text takes (more only if one sequence needs it)."""
POOL_BYTES = 1 << 30
"""KV cache of generate, stream and chat, if one sequence does not need more."""
GREEDY = SamplingParams()


class LLM:
    """A model that generates. Raises CheckpointError, TokenizerError or DoesNotFit if it cannot be loaded.

    `weights`: "stored" keeps integer and bfloat16 weights as compact as the file; "float" expands all to float32, which
    is what everything else is compared with.
    `backend`: what computes: "cpu" (C++), "reference" (torch), or "auto": cpu wherever it can run the model.
    `activations`: "int8" rounds them before they meet packed weights, "exact" keeps float32; "auto" is the backend's
    choice, and so is the dtype of the KV cache, unless `kv_cache` names one. `reference` is exact in both.
    `max_batch`: most prompts that are run together.
    `tp`, `pp`: processes that share every layer, and stages of layers, each of so many processes; `nodes`: machines
    that they are on, which join this one.
    `reserve_tokens`: a prompt and its answer of so many tokens must fit beside the weights, or nothing is loaded.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        weights: Weights = "stored",
        *,
        backend: BackendName = "auto",
        activations: Activations = "auto",
        kv_cache: str = "auto",
        max_batch: int = MAX_BATCH,
        reserve_tokens: int = 0,
        progress: Progress | None = None,
        tp: int = 1,
        pp: int = 1,
        nodes: Nodes | None = None,
    ) -> None:
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise EngineError(f"max_batch is {max_batch!r}, expected 1 or more")
        torch.set_num_threads(threads())
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        self.config = self.checkpoint.config
        if nodes is None:
            per_token = kv_bytes_per_token(self.checkpoint, backend, weights, kv_cache)
            _require_room(self.checkpoint, weights, per_token, reserve_tokens)
        self.tokenizer = self.checkpoint.tokenizer()
        self.backend = choose(self.checkpoint, backend, weights, activations, kv_cache, progress, tp, pp, nodes)
        self.pool = KVPool(self.backend)
        """Blocks for those who run rows of their own; the engine's are apart, and are forgotten meanwhile."""
        self.max_batch = max_batch
        self._inbox: dict[str, list[Output]] = {}
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Many[str] | Many[Many[int]],
        params: SamplingParams | Many[SamplingParams] = GREEDY,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Complete every prompt (text, or token ids), in order; `params` for all, or one for each.

        With `n` above 1 a prompt has so many completions, one after another. Raises EngineError for a prompt that is
        empty or too long.
        """
        if isinstance(prompts, str):
            raise EngineError("prompts is one text, expected a list of prompts")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise EngineError(f"{len(each)} sampling params for {len(prompts)} prompts")
        pairs: Iterator[tuple[Prompt, SamplingParams]] = zip(prompts, each, strict=True)
        requests = [(self._tokens(p), q) for p, q in pairs]
        names = self._add(requests, "prompt {}: ")
        parts = {(name, choice): _Part() for name, q in zip(names, each, strict=True) for choice in range(q.n)}
        done = 0
        for output in self._outputs(names):
            parts[output.request_id, output.choice].take(output)
            done += output.finish_reason is not None
            if progress is not None and output.finish_reason is not None:
                progress("generating", done, len(parts))
        return [part.completion() for part in parts.values()]

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[Token]:
        """Tokens of one completion as they come; the last has a finish_reason. Raises EngineError at once."""
        if params.n > 1:
            raise EngineError(f"a stream is one completion, n is {params.n}")
        tokens = self._tokens(prompt)
        self.engine.check(tokens, params)
        return self._streamed(tokens, params)

    def chat(self, messages: Many[Mapping[str, str]], params: SamplingParams = GREEDY) -> Completion:
        """The assistant's answer to messages `{"role", "content"}`. Raises ChatTemplateError as well."""
        return self.generate([self.chat_tokens(messages)], params)[0]

    def chat_tokens(self, messages: Many[Mapping[str, str]]) -> list[int]:
        """The prompt that the model's chat template makes of messages, ready for an answer."""
        if self.tokenizer.chat_template is None:
            raise EngineError(
                f"{self.checkpoint.name} has no chat template", hint="generate and stream take a prompt without one"
            )
        return self.tokenizer.chat([dict(m) for m in messages])

    def sample_tokens(
        self, sequences: int, length: int, seed: int, temperature: float = 1.0, progress: Progress | None = None
    ) -> Tensor:
        """Text that the model writes by itself: int64 [sequences, length], sampled from its start token.

        Nothing is truncated or masked: after an end token it goes on as the model would. The start token is not part of
        the result. The same seed gives the same tokens. They are sampled in waves, so that many take no more memory
        than a few: `sampling_bytes` says how much. Raises EngineError, DoesNotFit.
        """
        params = SamplingParams(max_tokens=length, temperature=temperature, seed=seed)
        if params.greedy or isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
            raise EngineError(f"cannot sample {sequences!r} sequences at temperature {temperature!r}")
        if length > self.config.max_positions:
            raise EngineError(f"length {length} is more than the {self.config.max_positions} positions of the model")
        self.engine.forget()
        uniform = torch.rand(sequences, length, generator=torch.Generator().manual_seed(seed))
        tokens = torch.empty(sequences, length, dtype=torch.int64)
        size = _wave_rows(self.backend.kv_bytes_per_token, sequences, length)
        done, total = 0, length * -(-sequences // size)
        for start in range(0, sequences, size):
            wave = slice(start, start + size)
            for at, column in enumerate(self._sampled(uniform[wave], temperature)):
                tokens[wave, at] = column
                done += 1
                if progress is not None:
                    progress("sampling", done, total)
        return tokens

    @cached_property
    def engine(self) -> Engine:
        """What runs requests; made when the first one comes."""
        size = self.backend.kv_bytes_per_token
        whole = cache_bytes(size, 1, self.config.max_positions)  # one sequence at full length always fits, memory given
        memory = min(max(POOL_BYTES, whole), cache_bytes(size, self.max_batch, self.config.max_positions))
        memory = max(min(memory, available_memory() // 2), cache_bytes(size, 1, 1))
        tokens = max(EngineOptions.max_batch_tokens, self.max_batch)
        return Engine(self.backend, self.tokenizer, EngineOptions(memory, tokens, self.max_batch))

    @property
    def start_token(self) -> int:
        """The token that begins a text: the beginning-of-sequence one, or else the one that ends a document."""
        if self.tokenizer.bos_id is not None:
            return self.tokenizer.bos_id
        if not self.tokenizer.eos_ids:
            raise EngineError(f"{self.checkpoint.name} has neither a start nor an end token to begin from")
        return min(self.tokenizer.eos_ids)

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _add(self, requests: list[tuple[list[int], SamplingParams]], where: str = "") -> list[str]:
        """Queue requests, all of them or none; their names. `where`: what an error says before its message."""
        names: list[str] = []
        for i, (tokens, params) in enumerate(requests):
            name = f"llm-{next(self._numbers)}"
            try:
                self.engine.add(name, tokens, params)
            except EngineError as error:
                for added in names:
                    self.engine.abort(added)
                raise EngineError(where.format(i) + error.message, hint=error.hint) from None
            self._inbox[name] = []
            names.append(name)
        return names

    def _streamed(self, tokens: list[int], params: SamplingParams) -> Iterator[Token]:
        for output in self._outputs(self._add([(tokens, params)])):
            yield from output.tokens

    def _outputs(self, names: list[str]) -> Iterator[Output]:
        """What these requests are given, step by step, to their ends. Whoever stops listening has aborted them."""
        rest = set(names)
        try:
            while rest:
                if not any(self._inbox[name] for name in rest):
                    for output in self.engine.step():
                        if output.request_id in self._inbox:  # else it is of somebody who asked the engine itself
                            self._inbox[output.request_id].append(output)
                for name in [n for n in names if n in rest]:
                    outputs, self._inbox[name] = self._inbox[name], []
                    for output in outputs:
                        if output.error is not None:
                            raise EngineError(output.error, hint="gossamer eval shows what the weights are worth")
                        yield output
                    if not self.engine.holds(name) and not self._inbox[name]:
                        rest.discard(name)
        finally:
            for name in names:
                self.engine.abort(name)
                del self._inbox[name]

    def _sampled(self, uniform: Tensor, temperature: float) -> Iterator[Tensor]:
        """One wave of text from the start token: tokens int64 [rows] for each column of uniform [rows, length]."""
        count, length = uniform.shape
        with Rows(self.pool, [[self.start_token]] * count, [length] * count) as rows:
            for at in range(length):
                logits = rows.forward()
                require_finite(logits)
                tokens = draw(scaled(logits, temperature), uniform[:, at])
                yield tokens
                rows.append(tokens.tolist())


class _Part:
    """One completion as it comes."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[Token] = []
        self.last: Output | None = None

    def take(self, output: Output) -> None:
        self.text += "".join(token.text for token in output.tokens)
        self.tokens += output.tokens
        self.last = output

    def completion(self) -> Completion:
        assert self.last is not None
        assert self.last.finish_reason is not None
        logprobs = tuple(t.logprobs for t in self.tokens) if self.tokens[0].logprobs is not None else None
        ids = tuple(token.id for token in self.tokens)
        return Completion(self.text, ids, self.last.finish_reason, self.last.prompt_tokens, logprobs)


def sampling_bytes(checkpoint: Checkpoint, sequences: int, length: int) -> int:
    """Bytes that `LLM(checkpoint).sample_tokens` takes: weights as stored, the cache and the logits of one wave."""
    per_token = kv_bytes_per_token(checkpoint)
    rows = _wave_rows(per_token, sequences, length)
    weights = resident_bytes(checkpoint, torch.float32, packed=True)
    return weights + cache_bytes(per_token, rows, length) + rows * checkpoint.config.vocab_size * BYTES_PER_LOGIT


def isa_in_use() -> str:
    """The instruction set of the kernels that compute: portable, avx2, avx512; or reference. Raises KernelError."""
    return dispatch.isa()


def _require_room(checkpoint: Checkpoint, weights: Weights, per_token: float, tokens: int) -> None:
    """Raise DoesNotFit if the weights fit (loading them checks that), but not with a KV cache for so many tokens."""
    tokens = min(tokens, checkpoint.config.max_positions)
    held = resident_bytes(checkpoint, torch.float32, packed=weights == "stored")
    cache = cache_bytes(per_token, 1, tokens)
    if cache > 0 and held <= available_memory():
        require_memory(
            held + cache,
            f"{checkpoint.name}: holding its weights ({held / 1e6:,.1f} MB) "
            f"and the KV cache for {tokens:,} tokens ({cache / 1e6:,.1f} MB)",
            "ask for fewer tokens (--max-tokens) or shorten the prompt, or take a smaller model",
        )


def _wave_rows(per_token: float, sequences: int, length: int) -> int:
    """How many sequences of so many tokens are sampled at once, with so many bytes of KV cache for each token.

    Free memory has no say: logits may differ in their last bits from one batch size to another, and the same seed is to
    give the same tokens however busy the machine is.
    """
    return min(sequences, MAX_BATCH, max(1, WAVE_BYTES // cache_bytes(per_token, 1, length)))
