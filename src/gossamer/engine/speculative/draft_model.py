"""A smaller model guesses: any that shares the vocabulary, a compressed form of the same model above all.

It reads what the target has accepted since it last guessed, and goes on from there; what it guessed wrong is written
over. It is given each request's own params and noise, so its guess is the very token that the target draws wherever
their distributions lead there. Its KV cache is its own, with prefix reuse of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ...errors import EngineError
from ..backend import BLOCK_SIZE, Backend, Batch, blocks_for
from ..block_manager import BlockManager, BlockTable, chain
from ..sampler import Sampler, draw_rows
from ..sequence import Sequence

CHUNK_TOKENS = 512
"""Most tokens of one step of the draft model."""
LITTLE = 16
"""Tokens that are no catching up: a few are read at every guess."""


@dataclass
class _Place:
    """One sequence in the draft model's cache."""

    table: BlockTable
    ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values are there, guessed ones included."""


class DraftModel:
    """A loaded model as a drafter. Raises EngineError, DoesNotFit."""

    name = "draft model"
    most = 6
    """Tokens that are worth guessing at once."""

    def __init__(self, backend: Backend, num_blocks: int) -> None:
        self.backend = backend
        self._blocks = BlockManager(num_blocks)
        self._places: dict[Sequence, _Place] = {}
        self._seconds_per_token = 0.0
        """Of text that it reads to catch up."""
        backend.reserve(num_blocks)

    def propose(self, sequences: Many[Sequence], samplers: Many[Sampler], count: int) -> list[list[int]]:
        """`count` tokens for each sequence; none for one that has no room in the cache."""
        guesses: dict[Sequence, list[int]] = {s: [] for s in sequences}
        rows = [(s, q) for s, q in zip(sequences, samplers, strict=True) if self._make_room(s, len(s.ids) + count)]
        positions = self.backend.config.max_positions
        for _ in range(count):
            rows = [(s, q) for s, q in rows if len(s.ids) + len(guesses[s]) <= positions]
            if not rows:
                break
            self._catch_up([s for s, _ in rows], guesses)
            for (sequence, _), token in zip(rows, self._next(rows, guesses), strict=True):
                guesses[sequence].append(token)
        return [guesses[s] for s in sequences]

    def behind(self, sequences: Many[Sequence]) -> float:
        unread = sum(len(s.ids) - 1 - (len(self._places[s].ids) if s in self._places else 0) for s in sequences)
        return self._seconds_per_token * max(0, unread - LITTLE * len(sequences))

    def forget(self, sequence: Sequence) -> None:
        place = self._places.pop(sequence, None)
        if place is not None:
            self._blocks.release(place.table)

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Find the sequence's place, drop what was guessed wrong, and take blocks for so many tokens."""
        tokens = min(tokens, self.backend.config.max_positions)
        place = self._places.get(sequence)
        if place is None:
            table = self._blocks.adopt(chain(sequence.ids), sequence.ids)
            place = self._places[sequence] = _Place(table, sequence.ids[: len(table.digests) * BLOCK_SIZE])
        else:
            same = min(len(place.ids), len(sequence.ids) - 1)  # after the last token it guesses, so that is fed
            while place.ids[:same] != sequence.ids[:same]:  # a few steps back at most: guesses end the list
                same -= 1
            del place.ids[same:]
            self._blocks.commit(place.table, place.ids, len(place.ids))
        if len(sequence.ids) >= self.backend.config.max_positions or not self._blocks.grow(place.table, tokens):
            self.forget(sequence)
            return False
        return True

    def _catch_up(self, sequences: list[Sequence], guesses: dict[Sequence, list[int]]) -> None:
        """Read what is missing of every sequence but its last token."""
        while True:
            pieces, room = [], CHUNK_TOKENS
            for sequence in sequences:
                place = self._places[sequence]
                known = [*sequence.ids, *guesses[sequence]]
                missing = known[len(place.ids) : -1][:room]
                if missing:
                    pieces.append((place, missing))
                    room -= len(missing)
            if not pieces:
                return
            began = time.perf_counter()
            self.backend.forward(self._batch(pieces, results=False))
            count = sum(len(tokens) for _, tokens in pieces)
            if count > LITTLE:
                seconds = (time.perf_counter() - began) / count
                self._seconds_per_token = max(seconds, 0.5 * (self._seconds_per_token + seconds))
            for place, tokens in pieces:
                place.ids += tokens

    def _next(self, rows: list[tuple[Sequence, Sampler]], guesses: dict[Sequence, list[int]]) -> list[int]:
        """Read the last token of every row, and draw the one after it."""
        pieces = [(self._places[s], [guesses[s][-1] if guesses[s] else s.ids[-1]]) for s, _ in rows]
        batch = self._batch(pieces, results=True)
        tokens: list[int] | None = None
        if all(s.wants_likeliest for s, _ in rows):
            with contextlib.suppress(EngineError):  # logits that are not finite: any guess will do
                tokens = self.backend.argmax(batch).tolist()
        if tokens is None:
            tokens = self._drawn(self.backend.forward(batch), rows, guesses)
        for place, fed in pieces:
            place.ids += fed
        return tokens

    def _drawn(
        self, logits: Tensor, rows: list[tuple[Sequence, Sampler]], guesses: dict[Sequence, list[int]]
    ) -> list[int]:
        """Draw as the target will: adjusted by each request's params, with its noise."""
        for row, (sequence, sampler) in enumerate(rows):
            if sampler.adjusts:
                try:
                    sampler.adjust(logits[row], sequence.tokens, guesses[sequence], sequence.end_ids)
                except EngineError:  # its grammar has no place for the guess
                    logits[row] = -np.inf
        return draw_rows(logits.nan_to_num(), [q for _, q in rows], [s.generated + len(guesses[s]) for s, _ in rows])

    def _batch(self, pieces: list[tuple[_Place, list[int]]], results: bool) -> Batch:
        """A step that reads these tokens; `results`: after the last of each."""
        starts = np.cumsum([0, *(len(tokens) for _, tokens in pieces)], dtype=np.int32)
        contexts = [len(place.ids) + len(tokens) for place, tokens in pieces]
        tables = np.zeros((len(pieces), max(map(blocks_for, contexts))), np.int32)
        for table, (place, _), context in zip(tables, pieces, contexts, strict=True):
            table[: blocks_for(context)] = place.table.blocks[: blocks_for(context)]
        return Batch(
            tokens=np.array([token for _, tokens in pieces for token in tokens], np.int32),
            query_start=starts,
            context_lens=np.array(contexts, np.int32),
            block_tables=tables,
            logit_rows=starts[1:] - 1 if results else np.empty(0, np.int32),
        )
