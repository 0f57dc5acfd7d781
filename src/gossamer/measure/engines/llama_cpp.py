"""llama.cpp through the C interface that llama-cpp-python binds: batches of token ids, its own defaults else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

LIBRARIES = ("numpy", "llama_cpp")
STEP = 2048
"""Most tokens of one call of llama_decode."""
KV_BYTES = 2
"""It stores keys and values as float16 unless it is told otherwise."""


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp
        import numpy

        self.lib, self.np = llama_cpp, numpy
        llama_cpp.llama_backend_init()
        # Also keeps the library from writing every tensor's name to stderr.
        self._log = llama_cpp.llama_log_callback(_say_nothing)
        llama_cpp.llama_log_set(self._log, None)
        self.model = llama_cpp.llama_model_load_from_file(job["model"].encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {job['model']}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = job["batch"] * _padded(job["context"])
        params.n_seq_max = job["batch"]
        params.n_batch = STEP
        params.n_threads = params.n_threads_batch = job["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context of this size")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(STEP, 0, 1)
        self.reserved_bytes: int | None = int(params.n_ctx * job["kv_elements"] * KV_BYTES)
        self.facts = {"dtype": None, "kv_cache": "f16", "kv_element_bytes": KV_BYTES}

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[float, float]:
        self._forget()
        began = time.perf_counter()
        tokens = [self._likeliest(self._read(row, ids)) for row, ids in enumerate(prompts)]
        first = time.perf_counter()
        for position in range(len(prompts[0]), len(prompts[0]) + output_tokens - 1):
            self._decode([(row, position, token, True) for row, token in enumerate(tokens)])
            tokens = [self._likeliest(row) for row in range(len(tokens))]
        return first - began, time.perf_counter() - first

    def nll(self, window: Sequence[int], scored: int) -> float:
        self._forget()
        first = len(window) - scored - 1
        total = 0.0
        for start in range(0, len(window) - 1, STEP):
            stop = min(start + STEP, len(window) - 1)
            self._decode([(0, place, window[place], place >= first) for place in range(start, stop)])
            for place in range(max(start, first), stop):
                logits = self._logits(place - start).astype(self.np.float64)
                top = logits.max()
                total += float(top + self.np.log(self.np.exp(logits - top).sum()) - logits[window[place + 1]])
        return total

    def _read(self, row: int, ids: Sequence[int]) -> int:
        """Compute a prompt; the place of its last token in the last call."""
        for start in range(0, len(ids), STEP):
            piece = ids[start : start + STEP]
            last = len(ids) - 1
            self._decode([(row, start + i, token, start + i == last) for i, token in enumerate(piece)])
        return (len(ids) - 1) % STEP

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """One call: (sequence, position, token, whether its logits are wanted) of each token."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (row, position, token, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        code = self.lib.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")

    def _logits(self, place: int) -> Any:
        """[vocab] float32, of a token of the last call."""
        return self.np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, place), (self.vocab,))

    def _likeliest(self, place: int) -> int:
        return int(self._logits(place).argmax())

    def _forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


def _say_nothing(level: int, text: bytes, data: Any) -> None:
    pass


def _padded(tokens: int) -> int:
    """llama.cpp rounds the context of each sequence up to a multiple of this."""
    return -(-tokens // 256) * 256
