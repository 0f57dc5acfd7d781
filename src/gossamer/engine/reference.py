"""The reference backend: prompts through the Decoder as a batch, then a token at a time. Knows no sampling and no text.

Prompts are padded on the right, which the Decoder's cache makes harmless, and are read in chunks, so that a long one
needs no more temporary memory than a short one. Rows are kept longest first: those with prompt left to read are then
always the first ones, and a finished row gives its place to the last.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..checkpoint.memory import require_memory
from ..model.config import ModelConfig
from ..model.decoder import Decoder, KVCache

CHUNK = 512
"""Tokens of each prompt that are read at once."""
CHUNK_TOKENS = 2048
"""Tokens of all prompts together that are read at once."""


class Batch:
    """Rows of a KV cache in use, and the tokens to come for each."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], max_length: int) -> None:
        """Prompts in order of falling length; `max_length` bounds prompt and generated tokens of each row.

        Raises DoesNotFit before anything is allocated.
        """
        assert all(len(a) >= len(b) for a, b in pairwise(prompts))
        require_memory(
            kv_bytes(decoder.config, len(prompts), max_length),
            f"the KV cache for {len(prompts)} x {max_length:,} tokens",
            "ask for fewer tokens, or for fewer prompts at a time",
        )
        self.decoder = decoder
        self.cache = KVCache(decoder.config, len(prompts), max_length)
        self.lengths = [len(p) for p in prompts]
        self._prompts = prompts

    def prefill(self) -> Tensor:
        """Read the prompts; logits float32 [rows, vocab_size] after the last token of each."""
        last = torch.empty(len(self.lengths), self.decoder.config.hidden_size)
        start = 0
        while start < self.lengths[0]:
            rows = sum(length > start for length in self.lengths)
            stop = min(start + max(1, min(CHUNK, CHUNK_TOKENS // rows)), self.lengths[0])
            tokens = torch.zeros(rows, stop - start, dtype=torch.int64)
            for row in range(rows):
                part = torch.tensor(self._prompts[row][start:stop], dtype=torch.int64)
                tokens[row, : len(part)] = part
            hidden = self._hidden(tokens, torch.arange(start, stop).expand(rows, -1))
            for row in range(rows):
                if self.lengths[row] <= stop:
                    last[row] = hidden[row, self.lengths[row] - 1 - start]
            start = stop
        return self.decoder.logits(last)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row; logits float32 [rows, vocab_size] after it."""
        positions = torch.tensor(self.lengths).unsqueeze(1)
        self.lengths = [n + 1 for n in self.lengths]
        return self.decoder.logits(self._hidden(torch.tensor(tokens).unsqueeze(1), positions)[:, 0])

    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its number."""
        last = len(self.lengths) - 1
        for tensors in (self.cache.keys, self.cache.values):
            for tensor in tensors:
                tensor[row] = tensor[last]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def _hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [rows, time, hidden_size] of tokens [rows, time] for the first rows of the cache."""
        return self.decoder.hidden(tokens, _first_rows(self.cache, len(tokens)), positions)


def kv_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Bytes of the keys and values of `rows` sequences of `length` tokens, in float32."""
    return config.kv_elements_per_token() * rows * length * 4


def _first_rows(cache: KVCache, rows: int) -> KVCache:
    """A cache that shares the memory of the first rows."""
    view = copy.copy(cache)
    view.keys = [k[:rows] for k in cache.keys]
    view.values = [v[:rows] for v in cache.values]
    return view
