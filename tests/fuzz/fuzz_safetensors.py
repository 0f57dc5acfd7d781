"""Mutated .safetensors files, alone and in a model folder: they are read, or refused by a typed error.

python tests/fuzz/fuzz_safetensors.py [SECONDS or FILE]
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import atheris
import safetensors.torch
import torch
from harness import READ_BYTES, WORK, fuzz, instrument

from gossamer.checkpoint import SafetensorsFile, base, files, hf, open_checkpoint, safetensors_io
from gossamer.errors import GossamerError
from gossamer.model import config_from_hf, tensor_names

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "silu",
    "tie_word_embeddings": True, "max_position_embeddings": 32,
}  # fmt: skip
WORDS = (
    "dtype", "shape", "data_offsets", "__metadata__", "BF16", "F32", "F64", "U8", "F8_E8M0", "[0,0]", "[]", "{}",
    "true", "null", "1e999", "-1", "0.5", "9223372036854775807", "\\ud800", "lm_head.weight", "model.norm.weight",
)  # fmt: skip
FOLDER = WORK / "safetensors-folder"


def seeds() -> dict[str, bytes]:
    shapes = tensor_names(config_from_hf(CONFIG))
    model = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    kinds = {str(d): torch.zeros(2, 3, dtype=d) for d in (torch.bool, torch.int64, torch.float8_e4m3fn, torch.float16)}
    return {
        "model": safetensors.torch.save(model, {"format": "pt"}),
        "head": safetensors.torch.save(model | {"lm_head.weight": torch.zeros(8, 8)}),
        "kinds": safetensors.torch.save(kinds | {"scalar": torch.tensor(1.0), "empty": torch.empty(0, 4)}),
        "none": safetensors.torch.save({}),
    }


def attempt(path: Path) -> None:
    try:
        file = SafetensorsFile(path)
        for name in file.names():
            if file.info(name).nbytes <= READ_BYTES:
                file.read(name)
                file.read(name, slice(1, 3))
    except GossamerError:
        pass
    shutil.copyfile(path, FOLDER / "model.safetensors")
    try:
        checkpoint = open_checkpoint(FOLDER)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except GossamerError:
        pass


def mutate(data: bytes, size: int, chance: random.Random) -> bytes:
    """Mutated anywhere; then, mostly, the length is made to fit the header again, or nothing behind it is reached."""
    if chance.random() < 0.3:
        return bytes(atheris.Mutate(data, size))
    end = data.rfind(b"}") + 1
    if chance.random() < 0.8 and end > 8:
        header, body = bytes(atheris.Mutate(data[8:end], size - 8 - len(data[end:]))), data[end:]
    else:
        header, body = data[8:end], bytes(atheris.Mutate(data[end:] or b"0", max(1, size - end)))
    return len(header).to_bytes(8, "little") + header + body


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "config.json").write_text(json.dumps(CONFIG))
    instrument(base, files, hf, safetensors_io)
    fuzz("safetensors", seeds(), attempt, WORDS, mutate)
