"""A backend without a model, for tests of everything above the seam: it counts.

After token t comes t + 1, round and round through the vocabulary. Each result is made from what the cache holds: the
tokens of a context are read back through its block table, so that a wrong block, one that was given away too early or
one that was never filled is an EngineError, not a subtle difference.
"""

from __future__ import annotations

import string
import time

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from ..checkpoint.tokenizer import SpecialTokens, Tokenizer
from ..errors import EngineError
from ..model.config import LayerConfig, ModelConfig, Rope
from .backend import BLOCK_SIZE, Backend, Batch

EOS = "<end>"
CHARACTERS = [c for c in string.printable if c.isprintable() or c == "\n"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}> {% endif %}"
)
NOWHERE = -1
"""A place of the cache that was never written."""


def fake_config(vocab_size: int = len(CHARACTERS) + 1, max_positions: int = 1024) -> ModelConfig:
    """A config of no real model."""
    layer = LayerConfig(num_heads=1, num_kv_heads=1, head_dim=2, ffn_width=2)
    return ModelConfig("llama", vocab_size, 2, (layer,), 1e-5, Rope(), "silu", True, max_positions)


def fake_tokenizer(chat: bool = True) -> Tokenizer:
    """One token for each printable character of ASCII and the newline, in order; then the one that ends an answer."""
    vocab = {c: i for i, c in enumerate(CHARACTERS)} | {EOS: len(CHARACTERS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken(EOS, special=True, normalized=False)])
    special = SpecialTokens({"eos": EOS}, frozenset([len(CHARACTERS)]))
    return Tokenizer(backend, special, chat_template=TEMPLATE if chat else None, model_vocab_size=len(vocab))


class FakeBackend(Backend):
    """Counts. `delay`: seconds of a step, and of each of its tokens `token_delay`."""

    name = "fake"
    kv_dtype = "fp32"

    def __init__(self, config: ModelConfig | None = None, delay: float = 0.0, token_delay: float = 0.0) -> None:
        self.config = config or fake_config()
        self.delay, self.token_delay = delay, token_delay
        self.kv_bytes_per_token = 8.0
        self.batches: list[Batch] = []
        """Every step so far, if `record` is set."""
        self.record = False
        self._pages = np.full((0, BLOCK_SIZE), NOWHERE, np.int32)

    @property
    def num_blocks(self) -> int:
        return len(self._pages)

    def reserve(self, num_blocks: int) -> None:
        if not 0 < num_blocks <= self.num_blocks:
            self._pages = np.full((num_blocks, BLOCK_SIZE), NOWHERE, np.int32)

    def hidden(self, batch: Batch) -> Tensor:
        raise EngineError("the fake backend has no hidden states")

    def head(self, states: Tensor) -> Tensor:
        raise EngineError("the fake backend has no head")

    def forward(self, batch: Batch) -> Tensor:
        """Logits [R, vocab_size]: 0, and 8 for the next number; 4 and 2 for the two after it."""
        batch.check(self.config, self.num_blocks)
        if self.delay or self.token_delay:
            time.sleep(self.delay + self.token_delay * len(batch.tokens))
        if self.record:
            self.batches.append(batch)
        after = np.empty(len(batch.tokens), np.int64)
        for s, (start, end) in enumerate(zip(batch.query_start[:-1], batch.query_start[1:], strict=True)):
            after[start:end] = self._write_and_read(batch, s, batch.tokens[start:end])
        logits = torch.zeros(len(batch.logit_rows), self.config.vocab_size)
        for value, ahead in ((2.0, 3), (4.0, 2), (8.0, 1)):
            tokens = torch.from_numpy((after[batch.logit_rows] + ahead) % self.config.vocab_size)
            logits[torch.arange(len(tokens)), tokens] = value
        return logits

    def _write_and_read(self, batch: Batch, sequence: int, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Put tokens into the cache, and read the context back to where each of them is."""
        context = int(batch.context_lens[sequence])
        places = np.arange(context)
        blocks = batch.block_tables[sequence][places // BLOCK_SIZE]
        new = places[context - len(tokens) :]
        self._pages[blocks[new], new % BLOCK_SIZE] = tokens
        held = self._pages[blocks, places % BLOCK_SIZE]
        if (held == NOWHERE).any():
            raise EngineError(f"sequence {sequence}: its context has places that were never written")
        self._check_context(sequence, held)
        read: NDArray[np.int32] = held[context - len(tokens) :]
        return read

    def _check_context(self, sequence: int, tokens: NDArray[np.int32]) -> None:
        """For tests that know what a context must look like."""

    @property
    def weight_bytes(self) -> int:
        return 0

    def describe(self) -> str:
        return "counts"
