"""The reference backend: the Decoder over a paged KV cache, in plain torch. The oracle of every other backend.

Keys and values are float32. Sequences that bring equally many tokens to a step go through the Decoder together, so the
decodes of a step are one batch, whatever their contexts; nothing is padded. Knows no request and no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.load import load_decoder
from ..checkpoint.memory import require_memory
from ..kernels import dispatch
from ..model.decoder import Decoder
from .backend import BLOCK_SIZE, Backend, Batch, Progress, Weights


class ReferenceBackend(Backend):
    """A Decoder and the blocks of its KV cache."""

    name = "reference"

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.whole = decoder.config
        """Of the whole model, where this is a part of one: what tokens and positions there are."""
        self.kv_bytes_per_token = 4.0 * decoder.config.kv_elements_per_token()
        self.num_blocks = 0
        self.keys: list[Tensor] = []
        """Per layer [num_blocks, BLOCK_SIZE, num_kv_heads, head_dim]; so are the values."""
        self.values: list[Tensor] = []

    @classmethod
    def load(cls, checkpoint: Checkpoint, weights: Weights = "stored", progress: Progress | None = None) -> Self:
        """A checkpoint's model, its weights as stored or expanded to float32. Raises CheckpointError, DoesNotFit."""
        return cls(load_decoder(checkpoint, progress=progress, packed=weights == "stored"))

    def reserve(self, num_blocks: int) -> None:
        if 0 < num_blocks <= self.num_blocks:
            return
        more = self.kv_bytes_per_token * BLOCK_SIZE * (num_blocks - self.num_blocks)
        require_memory(
            int(more),
            f"{'growing ' if self.num_blocks else ''}the KV cache {'to' if self.num_blocks else 'for'} "
            f"{num_blocks * BLOCK_SIZE:,} tokens",
            "ask for fewer tokens, or for fewer prompts at a time",
        )
        self.keys, self.values = [], []  # first: both at once would take more
        shapes = [(num_blocks, BLOCK_SIZE, c.num_kv_heads, c.head_dim) for c in self.config.layers if num_blocks]
        self.keys, self.values = ([torch.zeros(shape) for shape in shapes] for _ in range(2))
        self.num_blocks = num_blocks

    @torch.inference_mode()
    def hidden(self, batch: Batch, before: Tensor | None = None) -> Tensor:
        """As the seam says; `before`: [T, hidden_size], what the layers of an earlier stage made of the tokens."""
        batch.check(self.whole, self.num_blocks)
        embedded = self.decoder.embed(torch.from_numpy(batch.tokens).long()) if before is None else before
        states = torch.empty(len(batch.tokens), self.config.hidden_size)
        for members in _equally_long(batch):
            cache = PagedCache(self, batch, members)
            x = embedded[cache.rows]
            if before is None:
                x = self.decoder.entrance(x, cache.positions)
            states[cache.rows] = self.decoder.through(x, cache, cache.positions)
        return states[torch.from_numpy(batch.logit_rows).long()]

    def head(self, states: Tensor) -> Tensor:
        if len(states) == 0:
            return torch.empty(0, self.config.vocab_size)
        return self.decoder.logits(states)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.hidden(batch))

    @property
    def weight_bytes(self) -> int:
        tensors = {t.data_ptr(): t for t in self.decoder.state_dict().values()}
        return sum(t.nbytes for t in tensors.values())

    def describe(self) -> str:
        isa = dispatch.isa()
        return f"{'plain torch' if isa == 'reference' else isa}, exact activations"


class PagedCache:
    """The Decoder's view of the cache for `members` of a batch, which bring equally many tokens each."""

    def __init__(self, backend: ReferenceBackend, batch: Batch, members: np.ndarray) -> None:
        self._backend = backend
        time = torch.arange(int(batch.query_lens[members[0]]))  # their tokens in this step, counted from 0
        lengths = torch.from_numpy(batch.context_lens[members]).long().unsqueeze(1)
        self._longest = int(lengths.max())
        self.rows = torch.from_numpy(batch.query_start[members]).long().unsqueeze(1) + time
        """[members, time]: where their tokens stand in the batch."""
        self.positions = lengths - len(time) + time
        """[members, time]."""
        blocks = torch.arange(-(-self._longest // BLOCK_SIZE))
        tables = torch.from_numpy(batch.block_tables[members]).long()[:, : len(blocks)]
        self._tables = tables.where(blocks * BLOCK_SIZE < lengths, 0)  # what is past the context may be anything
        block = self._tables.gather(1, self.positions // BLOCK_SIZE)
        self._slots = block * BLOCK_SIZE + self.positions % BLOCK_SIZE
        self._unseen = (torch.arange(self._longest) >= lengths).nonzero(as_tuple=True)

    def store(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [members, time, num_kv_heads, head_dim]; all of them [members, num_kv_heads, past, head_dim]."""
        return self._store(self._backend.keys[layer], k), self._store(self._backend.values[layer], v)

    def _store(self, pool: Tensor, new: Tensor) -> Tensor:
        pool.flatten(0, 1)[self._slots] = new
        held = pool.index_select(0, self._tables.flatten()).view(len(self._tables), -1, *pool.shape[2:])
        held = held[:, : self._longest]
        held[self._unseen] = 0.0  # left by others: masked, but NaN would shine through the mask
        return held.transpose(1, 2)


def _equally_long(batch: Batch) -> Iterator[np.ndarray]:
    """Indices of the sequences that bring 1 token to this step, then of those that bring 2, ..."""
    lengths = batch.query_lens
    for length in np.unique(lengths):
        yield np.flatnonzero(lengths == length)
