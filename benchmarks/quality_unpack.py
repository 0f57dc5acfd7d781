"""A folder in the GPTQ layout as a float folder that holds the very same weights.

`qweight` int32 [in * bits / 32, out] holds codes along its rows and `qzeros` int32 [groups, out * bits / 32] zero
points along its columns, both as one stream of bits from the lowest up; `scales` float16 [groups, out]; `g_idx` int32
[in] says which group a column is in. Version 1 of the layout stores zero points less one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack_folder(packed: Path, out: Path) -> None:
    """Write `out`: quantized layers as float32 weights, every other tensor and file as it is.

    Raises KeyError, ValueError if the config does not speak of this layout.
    """
    config = json.loads((packed / "config.json").read_text())
    grid = config.pop("quantization_config")
    one = {"gptq": 1, "gptq_v2": 0}[grid.get("checkpoint_format", "gptq")]
    tensors: dict[str, Tensor] = {}
    for file in sorted(packed.glob("*.safetensors")):
        tensors |= load_file(file)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in packed.iterdir():
        told = path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json")
        if told and "quant" not in path.name:
            shutil.copy(path, out)
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(unpack(tensors, int(grid["bits"]), one), out / "model.safetensors", {"format": "pt"})


def unpack(tensors: Mapping[str, Tensor], bits: int, less: int) -> dict[str, Tensor]:
    """Float tensors of a model; `less` is what zero points are stored less by."""
    plain = {name: t.float() for name, t in tensors.items() if name.rpartition(".")[2] not in PARTS}
    for name in (name for name in tensors if name.endswith(".qweight")):
        layer = name.removesuffix(".qweight")
        parts = (tensors[f"{layer}.{part}"] for part in PARTS[:3])
        plain[f"{layer}.weight"] = weight_of(*parts, tensors.get(f"{layer}.g_idx"), bits, less)
    return plain


def weight_of(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, less: int) -> Tensor:
    """float32 [out, in] of one layer."""
    groups, rows = scales.shape
    columns = qweight.shape[0] * 32 // bits
    codes = bit_stream(qweight, bits)  # [in, out]
    zeros = (bit_stream(qzeros.T, bits).T[:, :rows] + less) & ((1 << bits) - 1)  # [groups, out]
    group = torch.arange(columns) // (columns // groups) if g_idx is None else g_idx.long()
    return ((codes - zeros[group]) * scales.float()[group]).T.contiguous()


def bit_stream(words: Tensor, bits: int) -> Tensor:
    """int64 [words * 32 / bits, n]: the codes that follow each other down the columns of int32 [words, n]."""
    first = torch.arange(words.shape[0] * 32 // bits) * bits
    word, shift = first // 32, (first % 32).unsqueeze(1)
    unsigned = words.long() & 0xFFFFFFFF
    following = torch.cat([unsigned[1:], torch.zeros_like(unsigned[:1])])
    return (unsigned[word] >> shift | following[word] << (32 - shift)) & ((1 << bits) - 1)
