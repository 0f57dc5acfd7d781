"""The serving engine: requests come and go while steps run; each step is schedule -> run -> sample.

One thread calls it. A step reads chunks of prompts and continues answers in one batch over a paged KV cache; what it
gave to each request comes back as a list of outputs. Knows backends and tokenizers; knows no HTTP and no process.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.memory import available_memory
from ..checkpoint.tokenizer import Tokenizer
from ..errors import EngineError
from .backend import BLOCK_SIZE, Backend, Batch, blocks_for
from .block_manager import BlockManager, chain
from .params import SamplingParams
from .sampler import Sampler, draw_rows, finite_rows, token_logprobs
from .scheduler import Piece, Scheduler
from .sequence import EngineStats, Output, Sequence, Token, TokenLogprobs
from .speculative import Speculator

if TYPE_CHECKING:
    from .structured import Grammars, Matcher

NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs. Raises EngineError for numbers that make no sense."""

    kv_memory: int | None = None
    """Bytes of KV cache; None: half of the machine's free memory, or less if all sequences at full length take less."""
    max_batch_tokens: int = 512
    """Most tokens of one step: fewer let answers flow evenly, more read prompts a little faster."""
    max_sequences: int = 64
    """Most sequences that run together."""
    prefix_reuse: bool = True
    """Keep the keys and values of finished requests for others that begin alike."""

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "kv_memory"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise EngineError(f"{name} is {value!r}, expected an integer of 1 or more")


class Engine:
    """A backend with requests in it. Raises EngineError, DoesNotFit."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        options: EngineOptions = EngineOptions(),
        speculator: Speculator | None = None,
    ) -> None:
        self.backend, self.tokenizer, self.options = backend, tokenizer, options
        self.blocks = BlockManager(_num_blocks(backend, options), options.prefix_reuse)
        self.scheduler = Scheduler(self.blocks, options.max_batch_tokens, options.max_sequences)
        self.speculator = speculator
        self._grammars: Grammars | None = None
        self._requests: dict[str, list[Sequence]] = {}
        self._samplers: dict[Sequence, Sampler] = {}
        self._reasons: dict[Sequence, str] = {}
        """Why a sequence cannot go on, where it is not that its logits are not finite."""
        self._epoch = backend.cache_epoch
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._step_seconds = 0.0

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens that a prompt may have: there must be room for one more."""
        return min(self.backend.config.max_positions, self.blocks.num_blocks * BLOCK_SIZE) - 1

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def holds(self, request_id: str) -> bool:
        """True until a request has ended."""
        return request_id in self._requests

    def add(self, request_id: str, prompt: Many[int], params: SamplingParams) -> None:
        """Queue a request. Raises EngineError for one that cannot be served, saying why; then nothing has changed."""
        if request_id in self._requests:
            raise EngineError(f"there is a request {request_id!r} already")
        limit = self.check(prompt, params)
        matchers = [self._matcher(params) for _ in range(params.n)]
        seed = secrets.randbits(63) if params.seed is None else params.seed
        if not self.has_work:
            self._begin()
        digests = chain(prompt) if params.prompt_logprobs is None else []  # its prompt is computed, not looked up
        sequences = []
        for choice, matcher in enumerate(matchers):
            stream = self.tokenizer.stream(params.skip_special)
            own = seed + choice * 0x9E3779B97F4A7C15 & (1 << 63) - 1  # the first has the seed itself
            sequence = Sequence(
                prompt, params, limit, self.tokenizer.eos_ids, stream,
                request_id=request_id, choice=choice, seed=own,
            )  # fmt: skip
            sequence.digests = digests
            self.scheduler.add(sequence)
            self._samplers[sequence] = Sampler(params, prompt, own, matcher)
            sequences.append(sequence)
        self._requests[request_id] = sequences
        self._prompt_tokens += len(prompt)

    def check(self, prompt: Many[int], params: SamplingParams) -> int:
        """Most tokens to generate after this prompt. Raises EngineError if it is no prompt or leaves no room."""
        vocab_size, positions = self.backend.config.vocab_size, self.backend.config.max_positions
        if not prompt:
            raise EngineError("the prompt is empty")
        for token in (*prompt, *(t for t, _ in params.logit_bias), *params.stop_token_ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise EngineError(f"token {token!r} is not one of 0 to {vocab_size - 1}")
        room = positions - len(prompt)
        if room < 1:
            raise EngineError(
                f"{len(prompt):,} tokens do not fit a context of {positions:,}",
                hint=f"shorten the prompt by {1 - room:,} tokens or more, so that there is room to answer",
            )
        limit = min(params.max_tokens, room)
        held = self.blocks.num_blocks
        if blocks_for(len(prompt) + limit) > held:
            raise EngineError(
                f"{len(prompt):,} tokens and an answer of up to {limit:,} do not fit the KV cache of "
                f"{held * BLOCK_SIZE:,} tokens",
                hint="shorten the prompt, lower max_tokens, or give the KV cache more memory",
            )
        return limit

    def abort(self, request_id: str) -> None:
        """Forget a request; its blocks are free when this returns. One that has ended or never was is ignored."""
        for sequence in self._requests.get(request_id, []):
            self._leave(sequence)
        self._requests.pop(request_id, None)

    def settle(self) -> None:
        """Take KV memory that was asked for by number now: that there is too little of it shows before any request,
        and no step waits for the system to give it. Raises DoesNotFit."""
        if self.options.kv_memory is not None and not self.has_work:
            self._begin()
            self.backend.touch()

    def step(self) -> list[Output]:
        """Compute one step; what it gave to each sequence. Raises what the backend raises."""
        if self.speculator is not None:
            self.speculator.propose(self.scheduler.running, self._samplers)
        pieces = self.scheduler.schedule()
        if not pieces:
            return []
        batch = self._batch(pieces)
        drafts = {piece.sequence: len(piece.drafts) for piece in pieces}
        began = time.perf_counter()
        chosen, logits = self._compute(batch, pieces)
        seconds = time.perf_counter() - began
        self._steps += 1
        self._step_seconds += seconds
        outputs, row = [], 0
        for piece in pieces:
            rows = self._rows(piece)
            some = None if logits is None else logits[row : row + rows]
            output = self._advance(piece, chosen[row : row + rows], some)
            row += rows
            if output is not None:
                outputs.append(output)
        if self.speculator is not None:
            self.speculator.observe(pieces, outputs, drafts, seconds)
        return outputs

    def stats(self) -> EngineStats:
        scheduler, speculator = self.scheduler, self.speculator
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks=self.blocks.num_blocks,
            kv_blocks_used=self.blocks.used,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            step_seconds=self._step_seconds,
            drafted_tokens=speculator.drafted if speculator else 0,
            accepted_tokens=speculator.accepted if speculator else 0,
            speculating=speculator is not None and speculator.active,
        )

    def check_idle(self) -> None:
        """Raise EngineError if something is still held although no request is there."""
        if not self.has_work and (self.blocks.used or self._samplers or self.scheduler.running):
            raise EngineError(f"{self.blocks.used} blocks of the KV cache are held by nobody")

    def forget(self) -> None:
        """Keep no contents of the KV cache: somebody else is about to use it. Raises EngineError while requests run."""
        if self.has_work:
            raise EngineError("the KV cache is in use", hint="let the requests that run end first")
        self.blocks.forget()

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        """The state of a completion's grammar. Raises EngineError for one that cannot be compiled."""
        if params.grammar is None:
            return None
        if self._grammars is None:
            from .structured import Grammars  # only now: building the library's view of the vocabulary takes time

            self._grammars = Grammars(self.tokenizer, self.backend.config.vocab_size)
        return self._grammars.matcher(params.grammar)

    def _begin(self) -> None:
        """From idle to busy: the cache is there, and what is remembered of it is still in it."""
        self.backend.reserve(self.blocks.num_blocks)
        if self.backend.cache_epoch != self._epoch:
            self.blocks.forget()
            self._epoch = self.backend.cache_epoch

    def _rows(self, piece: Piece) -> int:
        """Rows of logits that a piece needs."""
        if self._tells_prompt(piece.sequence):
            return len(piece.tokens)
        return 1 + len(piece.drafts) if piece.ends else 0

    def _tells_prompt(self, sequence: Sequence) -> bool:
        """True while log-probabilities of its prompt are to be made."""
        return sequence.params.prompt_logprobs is not None and sequence.generated == 0

    def _batch(self, pieces: list[Piece]) -> Batch:
        """The step as arrays."""
        tokens: list[int] = []
        starts, contexts = [0], []
        rows: list[int] = []
        for piece in pieces:
            fed = piece.tokens
            tokens += fed
            starts.append(len(tokens))
            contexts.append(piece.sequence.computed + len(fed))
            rows += range(len(tokens) - self._rows(piece), len(tokens))
        tables = np.zeros((len(pieces), max(map(blocks_for, contexts))), np.int32)
        for table, piece, context in zip(tables, pieces, contexts, strict=True):
            used = blocks_for(context)
            table[:used] = piece.sequence.table.blocks[:used]
        return Batch(
            tokens=np.array(tokens, np.int32),
            query_start=np.array(starts, np.int32),
            context_lens=np.array(contexts, np.int32),
            block_tables=tables,
            logit_rows=np.array(rows, np.int32),
        )

    def _compute(self, batch: Batch, pieces: list[Piece]) -> tuple[list[int], Tensor | None]:
        """A token for each row, -1 where there is none, and the model's own logits where somebody asked for them."""
        if all(p.sequence.wants_likeliest for p in pieces):
            try:
                likeliest: list[int] = self.backend.argmax(batch).tolist()
                return likeliest, None
            except EngineError as error:
                if NOT_FINITE not in error.message:
                    raise
        logits = self.backend.forward(batch)
        with torch.inference_mode():
            told = any(p.sequence.params.logprobs is not None or self._tells_prompt(p.sequence) for p in pieces)
            return self._draw(logits.clone() if told else logits, pieces), logits if told else None

    def _draw(self, logits: Tensor, pieces: list[Piece]) -> list[int]:
        """Adjust logits [R, vocab_size] for their requests, and draw."""
        samplers, positions, row = [], [], 0
        for piece in pieces:
            sequence, sampler = piece.sequence, self._samplers[piece.sequence]
            count = self._rows(piece)
            wanted = 1 + len(piece.drafts) if piece.ends else 0
            for i in range(count):
                at = max(0, i - (count - wanted))
                samplers.append(sampler)
                positions.append(sequence.generated + at)
                if sampler.adjusts and i >= count - wanted:
                    self._adjust(logits[row + i], sequence, piece.drafts[:at])
            row += count
        finite = finite_rows(logits)
        logits[[not good for good in finite]] = 0.0
        drawn = draw_rows(logits, samplers, positions)
        return [token if good else -1 for token, good in zip(drawn, finite, strict=True)]

    def _adjust(self, logits: Tensor, sequence: Sequence, drafts: list[int]) -> None:
        """Change a row of logits as its request asks; where that fails, the row fails alone, for this reason."""
        try:
            self._samplers[sequence].adjust(logits, sequence.tokens, drafts, sequence.end_ids)
        except EngineError as error:
            logits.fill_(torch.nan)
            if not drafts:  # else the draft was no good, and is not followed so far
                self._reasons[sequence] = error.message

    def _advance(self, piece: Piece, chosen: list[int], logits: Tensor | None) -> Output | None:
        """Take a piece's results into its sequence; what is to be told of them, if anything."""
        sequence = piece.sequence
        first = sequence.generated == 0
        told: list[Token] = []
        error = None
        if self._tells_prompt(sequence) and logits is not None:
            self._note_prompt(sequence, piece.count, logits)
            error = NOT_FINITE if -1 in chosen[: piece.count] else None
            chosen, logits = chosen[piece.count - 1 :], logits[piece.count - 1 :]
        if error is None and not piece.ends:
            self.scheduler.done(piece, sequence.computed + piece.count)
            return None
        if error is None:
            told, error = self._push(sequence, piece.drafts, chosen, logits)
        self.scheduler.done(piece, len(sequence.ids) - 1 if told else sequence.computed)
        self._generated_tokens += len(told)
        if error is not None or sequence.finish_reason is not None:
            self._end(sequence)
        return Output(
            sequence.request_id, sequence.choice, tuple(told),
            "abort" if error else sequence.finish_reason, sequence.stop_reason, error,
            sequence.prompt_tokens, sequence.cached_tokens or 0,
            tuple(sequence.prompt_logprobs) if first and told and sequence.prompt_logprobs else None,
        )  # fmt: skip

    def _push(
        self, sequence: Sequence, drafts: list[int], chosen: list[int], logits: Tensor | None
    ) -> tuple[list[Token], str | None]:
        """Append what was drawn, as far as drafts were right; and what went wrong."""
        told: list[Token] = []
        for i, token in enumerate(chosen):
            if token < 0:
                return told, None if told else self._reasons.get(sequence, NOT_FINITE)  # the next step meets it again
            logprobs = None
            if sequence.params.logprobs is not None and logits is not None:
                logprobs = token_logprobs(logits[i].log_softmax(-1), token, sequence.params.logprobs)
            try:
                self._samplers[sequence].accept(token)
            except EngineError as problem:
                return told, problem.message
            told.append(sequence.push(token, logprobs))
            if sequence.finish_reason is not None or i >= len(drafts) or drafts[i] != token:
                break
        return told, None

    def _note_prompt(self, sequence: Sequence, count: int, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens after those that this piece has read."""
        wanted = sequence.params.prompt_logprobs
        assert wanted is not None
        notes: list[TokenLogprobs | None] = sequence.prompt_logprobs or [None]
        for i in range(count):
            at = sequence.computed + i + 1
            if at < sequence.prompt_tokens and at == len(notes):  # not those that a preemption has read again
                notes.append(token_logprobs(logits[i].log_softmax(-1), sequence.ids[at], wanted))
        sequence.prompt_logprobs = notes

    def _end(self, sequence: Sequence) -> None:
        """A sequence has finished; its request has when all of its choices have."""
        self._leave(sequence)
        rest = self._requests[sequence.request_id]
        rest.remove(sequence)
        if not rest:
            del self._requests[sequence.request_id]

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self._samplers[sequence]
        self._reasons.pop(sequence, None)
        if self.speculator is not None:
            self.speculator.forget(sequence)


def _num_blocks(backend: Backend, options: EngineOptions) -> int:
    """Blocks of the KV cache that the options ask for."""
    size = BLOCK_SIZE * backend.kv_bytes_per_token
    if options.kv_memory is not None:
        blocks = int(options.kv_memory // size)
        if blocks < 1:
            raise EngineError(
                f"{options.kv_memory:,} bytes of KV cache hold not one block of {BLOCK_SIZE} tokens ({size:,.0f} bytes)"
            )
        return blocks
    most = options.max_sequences * blocks_for(backend.config.max_positions)
    return max(1, min(most, int(available_memory() // 2 // size)))
