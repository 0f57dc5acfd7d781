"""Which tokens of which sequences the next step computes. Knows no torch, no model and no text.

Continuous batching (Orca, Yu et al., OSDI 2022) with chunked prefill (Sarathi-Serve, Agrawal et al., arXiv 2403.02310):
a step has a budget of tokens, decodes are served first, and the rest goes to prompts, the oldest first. Where blocks
run out the youngest sequence is preempted: its blocks are free at once, and it is computed again when its turn comes.
The oldest one always goes on, so everything ends. A prompt whose next block another sequence is about to compute waits
for that instead of computing it as well.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import EngineError
from .backend import BLOCK_SIZE, blocks_for
from .block_manager import BlockManager, chain
from .sequence import Sequence

SPARE = 0.01
"""Share of the blocks that a prompt must leave free for those that decode."""


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
        """By arrival, and so is `running`."""
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        """Prompt tokens that were looked up when their sequence was first admitted, and found: `prefix_hits`."""
        self.prefix_hits = 0
        self._arrivals = 0

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
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not: its blocks are free."""
        self.blocks.release(sequence.table)
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def schedule(self) -> list[Piece]:
        """The next step, its blocks taken: the oldest sequence first; empty if there is nothing to do."""
        pieces: dict[int, Piece] = {}
        budget = self.max_batch_tokens
        preempted = self.preemptions
        drafts = self._room_for_drafts()
        for sequence in list(self.running):
            if sequence.missing == 1 and sequence in self.running:  # else it made room for an older one
                del sequence.drafts[drafts:]
                if self._decode(sequence):
                    pieces[sequence.arrival] = Piece(sequence, 1)
                    drafts -= len(sequence.drafts)
                    budget -= 1 + len(sequence.drafts)
        for sequence in self.running:
            if sequence.missing > 1 and budget > 0:
                pieces[sequence.arrival] = _chunk(sequence, budget)
                budget -= pieces[sequence.arrival].count
        if self.preemptions == preempted:
            for sequence in self._admitted(budget):
                pieces[sequence.arrival] = _chunk(sequence, budget)
                budget -= pieces[sequence.arrival].count
                if budget <= 0:
                    break
        return [pieces[arrival] for arrival in sorted(pieces)]

    def done(self, piece: Piece, computed: int) -> None:
        """Say that a piece was computed, and that the first `computed` tokens of its sequence are in the cache."""
        sequence = piece.sequence
        sequence.computed = computed
        sequence.drafts = []
        self.blocks.commit(sequence.table, sequence.ids, computed)
        self.blocks.shrink(sequence.table, len(sequence.ids))  # what only drafts needed

    def _room_for_drafts(self) -> int:
        """Tokens of a step that drafts may take: each sequence has one first, prompts to be read half of the rest."""
        room = self.max_batch_tokens - len(self.running)
        enter = bool(self.waiting) and len(self.running) < self.max_sequences
        return room // 2 if enter or any(s.missing > 1 for s in self.running) else room

    def _decode(self, sequence: Sequence) -> bool:
        """Take blocks for the token of a decoding sequence, preempting the youngest if it must, maybe itself: False."""
        others = len(self.running) - 1  # drafts take no block that another may need now
        if not self.blocks.grow(sequence.table, len(sequence.ids) + len(sequence.drafts), others):
            sequence.drafts = []
        while not self.blocks.grow(sequence.table, len(sequence.ids)):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again from its tokens."""
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.computed, sequence.drafts = 0, []
        if sequence.params.prompt_logprobs is None or sequence.generated:
            sequence.digests = chain(sequence.ids)  # some of it may still be there by then
        bisect.insort(self.waiting, sequence, key=lambda s: s.arrival)
        self.preemptions += 1

    def _admitted(self, budget: int) -> Iterator[Sequence]:
        """Waiting sequences that now run, the oldest first, while there are blocks for all of their tokens."""
        coming = {digest for s in self.running if s.missing > 1 for digest in s.digests[len(s.table.digests) :]}
        spare = int(SPARE * self.blocks.num_blocks)
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_sequences:
                return
            if self._is_coming(sequence, coming):
                continue
            if not self._admit(sequence, spare if self.running else 0):
                return  # and no younger one passes it
            coming.update(sequence.digests[len(sequence.table.digests) :])
            yield sequence

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
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
        return True


def _chunk(sequence: Sequence, budget: int) -> Piece:
    """As much of a prompt as the budget has room for."""
    most = budget if sequence.params.prompt_logprobs is None else min(budget, PROMPT_LOGPROBS_CHUNK)
    return Piece(sequence, min(sequence.missing, most))
