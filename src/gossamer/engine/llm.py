"""The public face of the engine: a model by name, prompts in, text out. Knows no command line and no server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
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
from .params import SamplingParams
from .runner import KVPool, Rows
from .sampling import Sampler, draw, require_finite, sample, scaled
from .sequence import Completion, Sequence, Token

Prompt: TypeAlias = "str | Many[int]"

MAX_BATCH = 32
BYTES_PER_LOGIT = 32
"""Four float32 numbers (logit, scaled, probability, a copy) and two float64 sums while a token is drawn."""
WAVE_BYTES = 1 << 30
"""Most bytes of KV cache that sampling a model's own text takes (more only if one sequence needs it)."""
GREEDY = SamplingParams()


class LLM:
    """A model that generates. Raises CheckpointError, TokenizerError or DoesNotFit if it cannot be loaded.

    `weights`: "stored" keeps integer and bfloat16 weights as compact as the file; "float" expands all to float32, which
    is what everything else is compared with.
    `backend`: what computes: "cpu" (C++), "reference" (torch), or "auto": cpu wherever it can run the model.
    `activations`: "int8" rounds them before they meet packed weights, "exact" keeps float32; "auto" is the backend's
    choice, and so is the dtype of the KV cache, unless `kv_cache` names one. `reference` is exact in both.
    `max_batch`: most prompts that are run together.
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
    ) -> None:
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise EngineError(f"max_batch is {max_batch!r}, expected 1 or more")
        torch.set_num_threads(threads())
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        self.config = self.checkpoint.config
        per_token = kv_bytes_per_token(self.checkpoint, backend, weights, kv_cache)
        _require_room(self.checkpoint, weights, per_token, reserve_tokens)
        self.tokenizer = self.checkpoint.tokenizer()
        self.backend = choose(self.checkpoint, backend, weights, activations, kv_cache, progress)
        self.pool = KVPool(self.backend)
        self.max_batch = max_batch

    def generate(
        self,
        prompts: Many[str] | Many[Many[int]],
        params: SamplingParams | Many[SamplingParams] = GREEDY,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Complete every prompt (text, or token ids), in order; `params` for all, or one for each.

        Raises EngineError for a prompt that is empty or too long, DoesNotFit if the KV cache does not fit.
        """
        if isinstance(prompts, str):
            raise EngineError("prompts is one text, expected a list of prompts")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise EngineError(f"{len(each)} sampling params for {len(prompts)} prompts")
        pairs: Iterator[tuple[Prompt, SamplingParams]] = zip(prompts, each, strict=True)
        sequences = [self._sequence(p, q, f"prompt {i}: ") for i, (p, q) in enumerate(pairs)]
        done = 0
        for wave in self._waves(sequences):
            for _, token in self._run(wave):
                if token.finish_reason is not None:
                    done += 1
                    if progress is not None:
                        progress("generating", done, len(sequences))
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[Token]:
        """Tokens of one completion as they come; the last has a finish_reason. Raises EngineError at once."""
        sequence = self._sequence(prompt, params)
        return (token for _, token in self._run([sequence]))

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

    @property
    def start_token(self) -> int:
        """The token that begins a text: the beginning-of-sequence one, or else the one that ends a document."""
        if self.tokenizer.bos_id is not None:
            return self.tokenizer.bos_id
        if not self.tokenizer.eos_ids:
            raise EngineError(f"{self.checkpoint.name} has neither a start nor an end token to begin from")
        return min(self.tokenizer.eos_ids)

    def _sequence(self, prompt: Prompt, params: SamplingParams, where: str = "") -> Sequence:
        """A checked request."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise EngineError(f"{where}the prompt is empty")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
                raise EngineError(f"{where}token {token!r} is not one of 0 to {self.config.vocab_size - 1}")
        room = self.config.max_positions - len(tokens)
        if room < 1:
            raise EngineError(
                f"{where}{len(tokens):,} tokens do not fit a context of {self.config.max_positions:,}",
                hint=f"shorten the prompt by {1 - room:,} tokens or more, so that there is room to answer",
            )
        limit = min(params.max_tokens, room)
        return Sequence(tokens, params, limit, self.tokenizer.eos_ids, self.tokenizer.stream())

    def _waves(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """Sequences in groups that are run together: of like lengths, and no more than memory holds."""
        rest = sorted(sequences, key=lambda s: -len(s.prompt))
        while rest:
            size = min(self.max_batch, len(rest))
            while size > 1 and self._cache_bytes(rest[:size]) > (available_memory() + self.pool.nbytes) // 2:
                size //= 2  # half of what is free: the steps need some as well
            yield rest[:size]
            rest = rest[size:]

    def _cache_bytes(self, sequences: list[Sequence]) -> int:
        """Bytes of KV cache that these may take."""
        return sum(cache_bytes(self.backend.kv_bytes_per_token, 1, _most_tokens(s)) for s in sequences)

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

    def _run(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, Token]]:
        """Prefill, then sample and step until every sequence has finished; they leave as they do."""
        running = [(s, Sampler(s.params)) for s in sequences]
        with Rows(self.pool, [s.prompt for s in sequences], [_most_tokens(s) for s in sequences]) as rows:
            while running:
                tokens = self._next_tokens(rows, running)
                for (sequence, _), token in zip(running, tokens, strict=True):
                    yield sequence, sequence.push(token)
                for row in reversed(range(len(running))):
                    if running[row][0].finish_reason is not None:
                        rows.drop(row)
                        del running[row]
                rows.append([sequence.tokens[-1] for sequence, _ in running])

    def _next_tokens(self, rows: Rows, running: list[tuple[Sequence, Sampler]]) -> list[int]:
        """One token for each row; logits leave the backend only if one of them needs more than the likeliest."""
        early = [row for row, (s, _) in enumerate(running) if not s.may_stop and not s.params.ignore_eos]
        if not early and all(s.params.greedy for s, _ in running):
            likeliest: list[int] = rows.argmax().tolist()
            return likeliest
        logits = rows.forward()
        with torch.inference_mode():
            for row in early:  # min_tokens: no end token may be drawn before
                logits[row, list(self.tokenizer.eos_ids)] = -torch.inf
        return sample(logits, [sampler for _, sampler in running])


def _most_tokens(sequence: Sequence) -> int:
    """Tokens that this one may have."""
    return len(sequence.prompt) + sequence.limit


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
