"""Runs in the Python that has llama.cpp's bindings: logits after each token, in float32, and what it makes of texts.

One JSON object on stdin, {"path", "tokens", "texts", "out"}; the logits go to `out` as .npy, token ids to stdout.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np

SIZE = 512
ERROR = 4


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, data: object) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    job = json.load(sys.stdin)
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_log, None)
    model = llama_cpp.llama_model_load_from_file(job["path"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit("the model was not loaded")
    vocab = llama_cpp.llama_model_get_vocab(model)
    np.save(job["out"], logits(model, llama_cpp.llama_vocab_n_tokens(vocab), job["tokens"]))
    print(json.dumps([tokens(vocab, text.encode()) for text in job["texts"]]))


def logits(model: object, vocab_size: int, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab_size], with keys and values kept in float32."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = SIZE
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(SIZE, 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama_cpp.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    rows = [llama_cpp.llama_get_logits_ith(context, place) for place in range(len(ids))]
    return np.stack([np.ctypeslib.as_array(row, (vocab_size,)).copy() for row in rows])


def tokens(vocab: object, text: bytes) -> list[int]:
    found = (ctypes.c_int32 * SIZE)()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), found, SIZE, True, True)
    return list(found[:count])


main()
