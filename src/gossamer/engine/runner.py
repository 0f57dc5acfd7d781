"""Sequences that run together: their tokens, their blocks of the KV cache, and the steps that bring them up to date.

Prompts are read in chunks, so that a long one needs no more temporary memory than a short one, and several of them in
one step. Knows backends and tokens; knows no sampling, no text and no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .backend import BLOCK_SIZE, Backend, Batch, blocks_for

CHUNK = 512
"""Tokens of each sequence that are read at once."""
CHUNK_TOKENS = 2048
"""Tokens of all sequences together that are read at once."""


class KVPool:
    """Which blocks of a backend's KV cache are free. It grows when they run out, and then all contents are lost."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.size = 0
        """Blocks that there are."""
        self.epoch = 0
        """Counts how often contents were lost: whoever holds blocks of an earlier epoch has to fill them again."""
        self._free: list[int] = []

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return int(self.size * BLOCK_SIZE * self.backend.kv_bytes_per_token)

    def take(self, count: int) -> list[int]:
        """So many blocks. Raises DoesNotFit."""
        missing = count - len(self._free)
        if missing > 0:
            self.backend.reserve(self.size + missing)
            self._free = [*reversed(range(self.size, self.size + missing)), *self._free]
            self.size += missing
            self.epoch += 1
        self.backend.cache_epoch += 1
        return [self._free.pop() for _ in range(count)]

    def give(self, blocks: Sequence[int]) -> None:
        """Take blocks back; the first of them will be the first to go again."""
        self._free += reversed(blocks)

    def release(self) -> None:
        """Give the memory back, if nobody holds a block."""
        if self.free == self.size:
            self.backend.reserve(0)
            self.size, self._free = 0, []
            self.epoch += 1
            self.backend.cache_epoch += 1


class Rows:
    """Token sequences in a backend. Use it as a context manager, so that their blocks become free again."""

    def __init__(self, pool: KVPool, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        """`limits`: most tokens that each row will have in the cache. Raises DoesNotFit before anything runs."""
        self._pool = pool
        self._tokens = [list(prompt) for prompt in prompts]
        self._cached = [0] * len(prompts)
        blocks = [blocks_for(limit) for limit in limits]
        taken = iter(pool.take(sum(blocks)))
        self._epoch = pool.epoch
        self._blocks = [list(islice(taken, count)) for count in blocks]
        self._tables = np.zeros((len(prompts), max(blocks, default=0)), np.int32)
        for table, row in zip(self._tables, self._blocks, strict=True):
            table[: len(row)] = row

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that are in the cache."""
        return list(self._cached)

    def forward(self) -> Tensor:
        """Logits float32 [rows, vocab_size] after the last token of each row; what is not cached yet is computed."""
        return self._catch_up(self._pool.backend.forward)

    def argmax(self) -> Tensor:
        """Likeliest next tokens int64 [rows]. Raises EngineError where logits are not finite."""
        return self._catch_up(self._pool.backend.argmax)

    def append(self, tokens: Sequence[int]) -> None:
        """Append one token to every row."""
        for row, token in zip(self._tokens, tokens, strict=True):
            row.append(token)

    def drop(self, row: int) -> None:
        """Forget a row: its blocks are free, and those after it move up."""
        self._pool.give(self._blocks.pop(row))
        self._tables = np.delete(self._tables, row, axis=0)
        del self._tokens[row], self._cached[row]

    def close(self) -> None:
        """Forget all rows."""
        while len(self):
            self.drop(len(self) - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _catch_up(self, verb: Callable[[Batch], Tensor]) -> Tensor:
        """The verb's results [rows, ...] after the last token of each row."""
        if self._epoch != self._pool.epoch:  # others needed more room: what was cached is lost
            self._cached, self._epoch = [0] * len(self), self._pool.epoch
        found: list[tuple[list[int], Tensor]] = []
        while pieces := self._pieces():
            result = verb(self._batch(pieces))
            for row, count in pieces:
                self._cached[row] += count
            found.append(([row for row, _ in pieces if self._is_read(row)], result))
        if len(found) == 1:
            return found[0][1]
        out = torch.empty(len(self), *result.shape[1:], dtype=result.dtype)
        for rows, result in found:
            out[rows] = result
        return out

    def _is_read(self, row: int) -> bool:
        return self._cached[row] == len(self._tokens[row])

    def _pieces(self) -> list[tuple[int, int]]:
        """The next step: rows, and how many of their tokens it reads; the first rows first."""
        pieces, room = [], CHUNK_TOKENS
        for row, (tokens, cached) in enumerate(zip(self._tokens, self._cached, strict=True)):
            count = min(len(tokens) - cached, CHUNK, room)
            if count > 0:
                pieces.append((row, count))
                room -= count
        return pieces

    def _batch(self, pieces: list[tuple[int, int]]) -> Batch:
        """The step that reads these pieces; results are wanted where it ends a row."""
        rows = [row for row, _ in pieces]
        ends = [self._cached[row] + count for row, count in pieces]
        tokens = [t for (row, n), end in zip(pieces, ends, strict=True) for t in self._tokens[row][end - n : end]]
        start = np.cumsum([0, *(count for _, count in pieces)], dtype=np.int32)
        last = [end == len(self._tokens[row]) for row, end in zip(rows, ends, strict=True)]
        return Batch(
            tokens=np.array(tokens, np.int32),
            query_start=start,
            context_lens=np.array(ends, np.int32),
            block_tables=self._tables[rows],
            logit_rows=start[1:][last] - 1,
        )
