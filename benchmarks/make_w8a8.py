"""An int8 artifact (one scale per row) as a w8a8 folder for vLLM: the same codes, activations quantized as they come.

python benchmarks/make_w8a8.py ARTIFACT OUT
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.checkpoint.safetensors_io import Entry, write_safetensors
from gossamer.formats import Integer

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def write_w8a8(artifact: Path, out: Path) -> None:
    """Write config, tokenizer and weights (compressed-tensors, `int-quantized`)."""
    checkpoint = open_checkpoint(artifact)
    shutil.copytree(artifact, out, ignore=shutil.ignore_patterns("*.safetensors", "gossamer.json"))
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS}},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    entries = [entry for name in checkpoint.names() for entry in _entries(checkpoint, name)]
    write_safetensors(out / "model.safetensors", entries)


def _entries(checkpoint: Checkpoint, name: str) -> list[Entry]:
    form, shape = checkpoint.format(name), checkpoint.shape(name)
    if not isinstance(form, Integer):
        return [Entry(name, checkpoint.dtype, shape, _later(lambda: checkpoint.tensor(name, dtype=checkpoint.dtype)))]
    if form.bits != 8 or form.group_size is not None or not form.symmetric:
        raise ValueError(f"{name} is {form.name}: w8a8 takes int8-channel")
    scale = f"{name}_scale"
    return [
        Entry(name, torch.int8, shape, _later(lambda: form.codes(checkpoint.stored(name)).codes)),
        Entry(scale, form.scale_dtype, (shape[0], 1), _later(lambda: checkpoint.stored(name)["weight_scale"])),
    ]


def _later(make: Callable[[], torch.Tensor]) -> Callable[[], Iterator[torch.Tensor]]:
    def chunks() -> Iterator[torch.Tensor]:
        yield make().contiguous()

    return chunks


if __name__ == "__main__":
    write_w8a8(Path(sys.argv[1]), Path(sys.argv[2]))
