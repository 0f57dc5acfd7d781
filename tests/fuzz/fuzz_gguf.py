"""Mutated .gguf files: they are read, or refused by a typed error.

python tests/fuzz/fuzz_gguf.py [SECONDS or FILE]
"""

from __future__ import annotations

import math
import random
import re
import struct
from pathlib import Path
from typing import Any

import atheris
import gguf
import numpy as np
from harness import READ_BYTES, WORK, fuzz, instrument

from gossamer.checkpoint import base, files, gguf_header, open_checkpoint
from gossamer.checkpoint import gguf as gguf_reader
from gossamer.errors import GossamerError
from gossamer.model import families

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
WIDTH = 32
WORDS = (
    "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear", "llama.rope.dimension_count",
    "llama.attention.key_length", "llama.expert_count", "split.count", "general.alignment", "rope_freqs.weight",
    "output.weight", "blk.0.attn_q.bias", "linear", "yarn", "none",
)  # fmt: skip


def tiny(kind: str, **changes: Any) -> bytes:
    """One layer, all of its matrices [32, 32], as the `gguf` package writes it."""
    path = WORK / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("embedding_length", "feed_forward_length", "context_length"):
        writer.add_uint32(f"llama.{key}", WIDTH)
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_uint32("tokenizer.ggml.padding_token_id", (1 << 32) - 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab"])
    for key, value in {"llama.attention.head_count": 2, **changes}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    number = gguf.GGMLQuantizationType[kind]
    for name in ("token_embd", *(f"blk.0.{part}" for part in MATRICES)):
        stored = gguf.quants.quantize(np.ones((WIDTH, WIDTH), np.float32), number)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=number)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    if "llama.attention.head_count_kv" in changes:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.0.{part}.bias", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def seeds() -> dict[str, bytes]:
    return {
        "q4_0": tiny("Q4_0"),
        "f16": tiny("F16", **{"llama.rope.scaling.factor": 4.0}),
        "q8_0": tiny("Q8_0", **{"llama.attention.head_count_kv": [2], "llama.rope.scaling.type": "linear"}),
    }


def attempt(path: Path) -> None:
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            if 4 * math.prod(checkpoint.shape(name)) <= READ_BYTES:
                checkpoint.tensor(name)
                checkpoint.tensor(name, slice(1, 3))
    except GossamerError:
        pass


def mutate(data: bytes, size: int, chance: random.Random) -> bytes:
    """Mutated anywhere, or in the header and without moving the rest, or in one number of one tensor's entry."""
    entries = [match.end() for match in re.finditer(rb"\.(weight|bias)", data)]
    if not entries or chance.random() < 0.3:
        return bytes(atheris.Mutate(data, size))
    if chance.random() < 0.5:
        start = chance.randrange(entries[-1])
        end = min(start + chance.choice([1, 4, 8, 64]), len(data))
        changed = bytes(atheris.Mutate(data[start:end], end - start))
        return data[:start] + changed.ljust(end - start, b"\0") + data[end:]
    result, position = bytearray(data), chance.choice(entries) + 4 * chance.randrange(8)
    number = struct.pack("<I", chance.choice([chance.randrange(48), 32 * chance.randrange(9), (1 << 32) - 32]))
    result[position : position + 4] = number
    return bytes(result[:size])


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    instrument(base, families, files, gguf_header, gguf_reader)
    fuzz("gguf", seeds(), attempt, WORDS, mutate)
