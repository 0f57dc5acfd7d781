"""Random steps of the engine and what they must give: drives any backend beside a Decoder without a cache.

    check(backend, decoder, random_steps(backend.config, seed), tolerance)

Steps mix chunks of prompts and decodes of several sequences whose blocks lie anywhere in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gossamer.engine.backend import BLOCK_SIZE, Backend, Batch, blocks_for
from gossamer.model import ModelConfig
from gossamer.model.decoder import Decoder

NUM_BLOCKS = 40
RAGGED = [
    {"num_heads": 4, "num_kv_heads": 2, "ffn_width": 96},
    {"num_heads": 2, "num_kv_heads": 1, "ffn_width": 64},
    {"num_heads": 3, "num_kv_heads": 3, "ffn_width": 128},
]
"""`gossamer_layers` of a model whose layers differ in heads, groups and width."""


@dataclass
class _Running:
    """A sequence: all of its tokens, how many a backend has seen, and its blocks."""

    tokens: list[int]
    blocks: list[int]
    seen: int = 0


@dataclass(frozen=True)
class Step:
    """A batch, and for each of its result rows the tokens that the row has seen."""

    batch: Batch
    contexts: list[list[int]] = field(default_factory=list)


def random_steps(config: ModelConfig, seed: int, sequences: int = 5, steps: int = 14) -> list[Step]:
    """Steps over sequences of up to the context's length, in NUM_BLOCKS blocks; finished ones make room for others."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(NUM_BLOCKS).tolist()
    running: list[_Running] = []
    made = []
    for _ in range(steps):
        while len(running) < sequences and len(free) >= blocks_for(config.max_positions):
            running.append(_new(config, rng, free))
        members = [running[i] for i in rng.permutation(len(running))[: rng.integers(1, len(running) + 1)]]
        made.append(_step(config, rng, [(m, _count(rng, m)) for m in members]))
        for sequence in [r for r in running if r.seen == len(r.tokens)]:
            free += sequence.blocks
            running.remove(sequence)
    return made


def check(backend: Backend, decoder: Decoder, steps: Sequence[Step], tolerance: float) -> None:
    """Every result of forward, argmax, hidden and head is the Decoder's, to `tolerance` times the logits' spread."""
    backend.reserve(NUM_BLOCKS)
    for step in steps:
        expected = expected_logits(decoder, step)
        logits = backend.forward(step.batch)
        assert logits.dtype == torch.float32
        assert logits.shape == expected.shape
        if not len(expected):
            continue
        assert float((logits - expected).abs().max()) <= tolerance * float(expected.std())
        # The same step again writes the same keys and values to the same places.
        again = backend.head(backend.hidden(step.batch))
        assert float((again - logits).abs().max()) <= tolerance * float(expected.std())
        likeliest = backend.argmax(step.batch)
        assert likeliest.dtype == torch.int64
        best = logits.gather(1, likeliest.unsqueeze(1)).squeeze(1)
        assert bool((best >= logits.amax(-1) - tolerance * float(expected.std())).all())


def expected_logits(decoder: Decoder, step: Step) -> torch.Tensor:
    """Logits [R, vocab_size] by the whole of each context at once, without a cache."""
    rows = [decoder(torch.tensor([context]), last_only=True)[0, 0] for context in step.contexts]
    return torch.stack(rows) if rows else torch.empty(0, decoder.config.vocab_size)


def _new(config: ModelConfig, rng: np.random.Generator, free: list[int]) -> _Running:
    length = int(rng.integers(1, config.max_positions + 1))
    tokens = rng.integers(0, config.vocab_size, length).tolist()
    return _Running(tokens, [free.pop() for _ in range(blocks_for(length))])


def _count(rng: np.random.Generator, sequence: _Running) -> int:
    """How many tokens a sequence brings: a decode as often as a chunk."""
    left = len(sequence.tokens) - sequence.seen
    return 1 if rng.random() < 0.5 else int(rng.integers(1, left + 1))


def _step(config: ModelConfig, rng: np.random.Generator, members: list[tuple[_Running, int]]) -> Step:
    tokens: list[int] = []
    contexts: list[list[int]] = []
    width = blocks_for(config.max_positions)
    tables = rng.integers(-(10**6), 10**6, (len(members), width), dtype=np.int32)  # past the context: anything
    for row, (sequence, count) in enumerate(members):
        start, sequence.seen = sequence.seen, sequence.seen + count
        tokens += sequence.tokens[start : sequence.seen]
        contexts += [sequence.tokens[: end + 1] for end in range(start, sequence.seen)]
        used = -(-sequence.seen // BLOCK_SIZE)
        tables[row, :used] = sequence.blocks[:used]
    wanted = rng.permutation(len(tokens))[: rng.integers(0, min(len(tokens), 6) + 1)]
    batch = Batch(
        tokens=np.array(tokens, np.int32),
        query_start=np.cumsum([0, *(count for _, count in members)], dtype=np.int32),
        context_lens=np.array([sequence.seen for sequence, _ in members], np.int32),
        block_tables=tables,
        logit_rows=wanted.astype(np.int32),
    )
    return Step(batch, [contexts[i] for i in wanted])
