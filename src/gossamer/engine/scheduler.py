"""Which tokens of which sequences the next step computes. Knows no torch, no model and no text.

Continuous batching (Orca, Yu et al., OSDI 2022) with chunked prefill (Sarathi-Serve, Agrawal et al., arXiv 2403.02310):
a step has a budget of tokens, decodes are served first, and the rest goes to prompts. Prompts take turns by the time
at which each would be read if nobody else were there, counted in tokens (the finish times of fair queueing, Demers,
Keshav & Shenker, SIGCOMM 1989): of those that come together the shortest is first, and a long one lets shorter ones
pass that come until as many tokens were computed as it has itself, but none that come later. While many steps' worth of
prompts waits, every second step is theirs alone. Where blocks run out the sequence whose turn is last is preempted: its
blocks are free at once, and it is computed again when its turn comes. The first one always goes on, so everything ends.
A prompt whose next block another sequence is about to compute waits for that instead of computing it as well.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

from ..errors import EngineError
from .backend import BLOCK_SIZE, blocks_for
from .block_manager import BlockManager, chain
from .sequence import Sequence

SPARE = 0.01
"""Share of the blocks that a prompt must leave free for those that decode."""

BURST_STEPS = 4
"""While prompts of more steps than these wait, answers take part in every second step only: each of their tokens costs
what more than one of a prompt does (its row of logits), and everyone who waits for a first token waits for it."""

PROMPT_LOGPROBS_CHUNK = 64
"""Most tokens of a step of a prompt whose log-probabilities are told: each of them takes a row of logits."""


@dataclass
class Piece:
    """What one step computes of one sequence: the next `count` tokens, and its drafts after the last of them."""

    sequence: Sequence
    count: int

    @property
    def drafts(self) -> list[int]:
        return self.sequence.drafts if self.ends else []

    @property
    def ends(self) -> bool:
        """True if it reaches the sequence's last token, after which the next one is sampled."""
        return self.count == self.sequence.missing

    @property
    def tokens(self) -> list[int]:
        """What is fed: drafts too."""
        sequence = self.sequence
        return sequence.ids[sequence.computed : sequence.computed + self.count] + self.drafts


class Scheduler:
    """Sequences that wait and sequences that run. Raises EngineError for one that can never run."""

    def __init__(self, blocks: BlockManager, max_batch_tokens: int, max_sequences: int) -> None:
        if max_batch_tokens < max_sequences:
            raise EngineError(
                f"a step of {max_batch_tokens} tokens cannot serve {max_sequences} sequences",
                hint="each that decodes takes a token: raise max_batch_tokens or lower max_sequences",
            )
        self.blocks = blocks
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: list[Sequence] = []
        """By turn, and so is `running`."""
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        """Prompt tokens that were looked up when their sequence was first admitted, and found: `prefix_hits`."""
        self.prefix_hits = 0
        self._arrivals = self._scheduled = 0
        """Sequences that came so far, and tokens that were scheduled: what turns are counted in."""
        self._paused = False
        """True in a step without answers."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        most = sequence.prompt_tokens + sequence.limit
        if blocks_for(most) > self.blocks.num_blocks:
            raise EngineError(
                f"{sequence.prompt_tokens:,} tokens and an answer of up to {sequence.limit:,} do not fit the KV cache, "
                f"which holds {self.blocks.num_blocks * BLOCK_SIZE:,}",
                hint="shorten the prompt, lower max_tokens, or give the KV cache more memory",
            )
        self._arrivals += 1
        known = self.blocks.match(sequence.digests, sequence.ids) * BLOCK_SIZE
        sequence.turn = (self._scheduled + sequence.prompt_tokens - known, self._arrivals)
        bisect.insort(self.waiting, sequence, key=_turn)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not: its blocks are free."""
        self.blocks.release(sequence.table)
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def schedule(self) -> list[Piece]:
        """The next step, its blocks taken, in order of turns; empty if there is nothing to do."""
        pieces: list[Piece] = []
        preempted = self.preemptions
        self._paused = not self._paused and self._is_burst()
        budget = self.max_batch_tokens
        if not self._paused:
            budget -= self._answer(pieces)
        self._read(pieces, budget, admits=self.preemptions == preempted)
        if self._paused and not pieces:  # nobody who waits can be admitted
            self._answer(pieces)
        self._scheduled += sum(piece.count for piece in pieces)
        return sorted(pieces, key=lambda piece: _turn(piece.sequence))

    def done(self, piece: Piece, computed: int) -> None:
        """Say that a piece was computed, and that the first `computed` tokens of its sequence are in the cache."""
        sequence = piece.sequence
        sequence.computed = computed
        sequence.drafts = []
        self.blocks.commit(sequence.table, sequence.ids, computed)
        self.blocks.shrink(sequence.table, len(sequence.ids))  # what only drafts needed

    def _is_burst(self) -> bool:
        """True if those who run, or could run beside them, have prompts of many steps to read."""
        free = self.max_sequences - len(self.running)
        reading = sum(s.missing for s in self.running if not s.decodes) + sum(s.missing for s in self.waiting[:free])
        return reading > BURST_STEPS * self.max_batch_tokens

    def _answer(self, pieces: list[Piece]) -> int:
        """Add the next token, and drafts, of every sequence that decodes; how many tokens that is."""
        drafts, taken = self._room_for_drafts(), 0
        for sequence in list(self.running):
            if sequence.decodes and sequence in self.running:  # else it made room for another
                del sequence.drafts[drafts:]
                if self._decode(sequence):
                    pieces.append(Piece(sequence, 1))
                    drafts -= len(sequence.drafts)
                    taken += 1 + len(sequence.drafts)
        return taken

    def _read(self, pieces: list[Piece], budget: int, admits: bool) -> None:
        """Add chunks of prompts by turns; of those who wait, as long as there are blocks for all of their tokens."""
        reading = [s for s in self.running if not s.decodes]
        coming = {digest for s in reading for digest in s.digests[len(s.table.digests) :]}
        spare = int(SPARE * self.blocks.num_blocks)
        admits = admits and len(self.running) < self.max_sequences  # else those who wait need not be looked at
        for sequence in heapq.merge(reading, self.waiting[:] if admits else [], key=_turn):
            if budget <= 0:
                return
            if not sequence.table.blocks:  # it waits
                if not admits or len(self.running) >= self.max_sequences or self._is_coming(sequence, coming):
                    continue
                admits = self._admit(sequence, spare if self.running else 0)  # if not, no later one passes it
                if not admits:
                    continue
                coming.update(sequence.digests[len(sequence.table.digests) :])
            pieces.append(_chunk(sequence, budget))
            budget -= pieces[-1].count

    def _room_for_drafts(self) -> int:
        """Tokens of a step that drafts may take: each sequence has one first, prompts to be read half of the rest."""
        room = self.max_batch_tokens - len(self.running)
        enter = bool(self.waiting) and len(self.running) < self.max_sequences
        return room // 2 if enter or any(not s.decodes for s in self.running) else room

    def _decode(self, sequence: Sequence) -> bool:
        """Take blocks for the token of a decoding sequence, preempting the last if it must, maybe itself: False."""
        others = len(self.running) - 1  # drafts take no block that another may need now
        if not self.blocks.grow(sequence.table, len(sequence.ids) + len(sequence.drafts), others):
            sequence.drafts = []
        while not self.blocks.grow(sequence.table, len(sequence.ids)):
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again from its tokens."""
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.computed, sequence.drafts = 0, []
        if sequence.params.prompt_logprobs is None or sequence.generated:
            sequence.digests = chain(sequence.ids)  # some of it may still be there by then
        bisect.insort(self.waiting, sequence, key=_turn)
        self.preemptions += 1

    def _is_coming(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """True if a sequence that runs is about to compute the first block that this one lacks."""
        if not coming or not self.blocks.reuse:
            return False
        known = self.blocks.match(sequence.digests, sequence.ids)
        usable = (len(sequence.ids) - 1) // BLOCK_SIZE  # its last token is computed anyway
        return known < min(usable, len(sequence.digests)) and sequence.digests[known] in coming

    def _admit(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence its blocks, known ones where there are any, and let it run; False if too few are free."""
        table = self.blocks.adopt(sequence.digests, sequence.ids)
        if not self.blocks.grow(table, len(sequence.ids), spare):
            self.blocks.release(table)
            return False
        sequence.table = table
        sequence.computed = len(table.digests) * BLOCK_SIZE
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.prefix_queries += sequence.prompt_tokens
            self.prefix_hits += sequence.computed
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_turn)
        return True


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn


def _chunk(sequence: Sequence, budget: int) -> Piece:
    """As much of a prompt as the budget has room for."""
    most = budget if sequence.params.prompt_logprobs is None else min(budget, PROMPT_LOGPROBS_CHUNK)
    return Piece(sequence, min(sequence.missing, most))
