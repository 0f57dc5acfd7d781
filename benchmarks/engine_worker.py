"""Gossamer's engine as a benchmark worker: MODEL. GOSSAMER_ISA and GOSSAMER_THREADS are the engine's own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gossamer import __version__
from gossamer.engine import LLM
from gossamer.engine.backend import Backend, Batch, blocks_for
from gossamer.settings import threads
from worker_loop import Request, prompts, serve

CHUNK = 512
"""Most prompt tokens in one step."""
WARM_STEPS = 4


class Sequences:
    """A batch of sequences that all grow alike, each in blocks of its own."""

    def __init__(self, backend: Backend, batch: int, longest: int) -> None:
        self.backend, self.batch, self.length = backend, batch, 0
        blocks = blocks_for(longest)
        backend.reserve(batch * blocks)
        self.tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """Likeliest next token [batch] after tokens [batch, queries] at the sequences' ends."""
        queries = tokens.shape[1]
        self.length += queries
        starts = np.arange(self.batch + 1, dtype=np.int32) * queries
        step = Batch(
            tokens=np.ascontiguousarray(tokens.reshape(-1), np.int32),
            query_start=starts,
            context_lens=np.full(self.batch, self.length, np.int32),
            block_tables=self.tables,
            logit_rows=starts[1:] - 1,
        )
        return np.asarray(self.backend.argmax(step), np.int32)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Feed prompts [batch, n] in steps of at most CHUNK tokens, as an engine's scheduler does."""
        size = max(1, CHUNK // self.batch)
        for start in range(0, tokens.shape[1], size):
            likeliest = self.feed(tokens[:, start : start + size])
        return likeliest

    def decode(self, likeliest: np.ndarray, steps: int) -> np.ndarray:
        """Greedy steps from the last tokens [batch]."""
        for _ in range(steps):
            likeliest = self.feed(likeliest[:, None])
        return likeliest


def seconds_of(backend: Backend, vocab: int, request: Request) -> float:
    """Seconds of the timed part of a request."""
    tokens, others = (np.array(prompts(request, vocab), np.int32) for _ in range(2))
    make = partial(Sequences, backend, request.batch, request.context + request.output + WARM_STEPS)
    if request.op == "prefill":
        make().prefill(others)  # warms up
        return timed(partial(make().prefill, tokens))
    make().decode(make().prefill(others[:, :1]), WARM_STEPS)
    sequences = make()
    first = sequences.prefill(tokens)
    return timed(partial(sequences.decode, first, request.output))


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def load() -> tuple[Callable[[Request], float], dict[str, Any]]:
    llm = LLM(sys.argv[1])
    backend = llm.backend
    facts = {
        "version": f"{__version__} ({backend.name}: {backend.describe()}, KV {backend.kv_dtype})",
        "backend": backend.name,
        "threads": threads(),
        "kv_bytes_per_token": backend.kv_bytes_per_token,
        "kv_dtype": backend.kv_dtype,
    }
    return partial(seconds_of, backend, llm.config.vocab_size), facts


if __name__ == "__main__":
    serve(load)
