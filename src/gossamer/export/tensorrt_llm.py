"""Folders for TensorRT-LLM: safetensors in ModelOpt's layout, and hf_quant_config.json that says which.

    W4A16_AWQ   weight uint8 [out / 2, in]: two rows in a byte, the even one in the low bits, codes of two's complement;
                weight_scale float16 [out, groups]; pre_quant_scale of ones, for nothing is scaled on the way in
    FP8_PER_CHANNEL_PER_TOKEN   weight E4M3 [out, in], weight_scale float32 [out]; it rounds activations to FP8, too
    floats      an ordinary folder
int8 in compressed-tensors form it takes for FP8, and int4 in that form it cannot load; NVFP4 needs scales of
activations that no recipe measures. Only the layout can be checked here: no engine is driven.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Entry, write_file
from ..errors import ExportError
from ..formats import Codebook, Dense, Format
from ..model import ModelConfig
from .base import FLOATS, FOLDER, Options, Progress, form_of, linear_formats, stored_of
from .folders import FolderExport, FolderReader, lazy, one_grid
from .grids import as_half

GROUPS = (64, 128)
"""Group sizes of its 4-bit kernels."""


class TensorRTExport(FolderExport):
    """A folder for TensorRT-LLM."""

    target = "tensorrt-llm"
    layouts = ("stored", "f16", "bf16")
    families = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
    some_windows = True
    unknown = "is not written for it: of Phi-3 it loads floats only, as gossamer convert saves them, others it has not"

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        for why in misread(checkpoint.config):
            raise ExportError(f"{self.target}: {why}", hint=FOLDER)
        formats = linear_formats(checkpoint)
        self.form: Format = next(iter(formats.values()))
        self.algorithm = None if (options.layout or "stored") in FLOATS else self._algorithm(checkpoint)
        super().__init__(checkpoint, options)
        if self.algorithm == "W4A16_AWQ":
            for name in formats:
                self._check(name)

    def is_packed(self, name: str) -> bool:
        return self.algorithm is not None and len(self.checkpoint.shape(name)) == 2 and ".layers." in name

    def packed(self, name: str) -> list[Entry]:
        out, columns = self.checkpoint.shape(name)
        module = name.removesuffix(".weight")
        if self.algorithm != "W4A16_AWQ":
            return [
                lazy(name, torch.float8_e4m3fn, (out, columns), lambda: stored_of(self.checkpoint, name)["weight"]),
                lazy(f"{module}.weight_scale", torch.float32, (out,), lambda: self._codes(name).scale.float().view(-1)),
            ]
        groups = self.form.groups(columns)
        return [
            lazy(name, torch.uint8, (out // 2, columns), lambda: pack_rows(self._codes(name).codes)),
            lazy(f"{module}.weight_scale", torch.float16, (out, groups), lambda: self._codes(name).scale.half()),
            lazy(f"{module}.pre_quant_scale", self.dtype, (columns,), lambda: torch.ones(columns, dtype=self.dtype)),
        ]

    def quantization_config(self) -> dict[str, Any] | None:
        return None  # it is in a file of its own

    def write(self, path: Path, progress: Progress) -> None:
        super().write(path, progress)
        if self.algorithm is None:
            return
        said: dict[str, Any] = {
            "quant_algo": self.algorithm,
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"],
        }
        if self.algorithm == "W4A16_AWQ":
            said |= {"group_size": self.form.group_size, "has_zero_point": False, "pre_quant_scale": True}
        content = {"producer": {"name": "modelopt", "version": "0.37.0"}, "quantization": said}
        write_file(path / "hf_quant_config.json", json.dumps(content, indent=2).encode() + b"\n")

    def reader(self, path: Path) -> TensorRTReader:
        return TensorRTReader(path)

    def _algorithm(self, checkpoint: Checkpoint) -> str | None:
        """Its name for how the matrices are stored. Raises ExportError for what it would read wrongly or not at all."""
        formats, form = linear_formats(checkpoint), self.form
        if all(isinstance(each, Dense) for each in formats.values()):
            return None
        if isinstance(form, Codebook) and form.kind == "fp8" and all(each == form for each in formats.values()):
            return "FP8_PER_CHANNEL_PER_TOKEN"
        grid = one_grid(checkpoint, self.target, "symmetric integers of 4 bits, FP8 or floats")
        if grid.bits != 4 or not grid.symmetric or grid.group_size not in GROUPS:
            raise ExportError(
                f"{self.target}: {grid.name} is none of its layouts: it would take int8 for FP8, and knows 4 bits only "
                f"symmetric in groups of {GROUPS[0]} or {GROUPS[1]}",
                hint="recipes that it takes: int4-gptq, int4-rtn, int4-awq, fp8; --to vllm takes the others",
            )
        return "W4A16_AWQ"

    def _check(self, name: str) -> None:
        if self.checkpoint.shape(name)[0] % 2:
            raise ExportError(
                f"{self.target}: {name} has {self.checkpoint.shape(name)[0]} rows, and two go into a byte",
                hint="--to vllm takes any number",
            )
        if as_half(self._codes(name).scale) is None:
            raise ExportError(
                f"{self.target}: the scales of {name} are not exact in float16", hint="--to vllm keeps them as they are"
            )

    def _codes(self, name: str) -> Any:
        return form_of(self.checkpoint, name).codes(stored_of(self.checkpoint, name))


def misread(config: ModelConfig) -> Iterator[str]:
    """What its models of other families than LLaMA and Mistral pass over."""
    if config.family in ("qwen2", "qwen3") and any(layer.window for layer in config.layers):
        yield f"its {config.family} has no sliding window"
    if config.family in ("qwen2", "qwen3") and config.rope.kind != "default":
        yield f"its {config.family} knows no rotary scaling {config.rope.kind}"
    if config.family == "gemma3_text" and (config.attention_softcap or config.final_softcap):
        yield "its gemma3_text has no soft cap"
    if config.family == "gemma3_text" and any(layer.biases for layer in config.layers):
        yield "its gemma3_text has no biases"


def pack_rows(codes: Tensor) -> Tensor:
    """uint8 [out / 2, in] of codes int8 [out, in] from -8: two rows in a byte, the even one in the low bits."""
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[0::2] | nibbles[1::2] << 4


class TensorRTReader(FolderReader):
    """The layout read by the words of hf_quant_config.json; a nibble from 8 on is negative."""

    def weight(self, name: str) -> Tensor:
        stored = self.tensor(name)
        packed = stored.dtype in (torch.uint8, torch.float8_e4m3fn)
        return self.unpacked(name.removesuffix(".weight")) if packed else stored.float()

    def unpacked(self, module: str) -> Tensor:
        stored, scale = self.tensor(f"{module}.weight"), self.tensor(f"{module}.weight_scale").float()
        if stored.dtype == torch.float8_e4m3fn:
            return stored.float() * scale.unsqueeze(1)
        weight = torch.empty(len(stored) * 2, stored.shape[1])
        for row in range(len(weight)):
            nibble = (stored[row // 2] >> 4 * (row % 2)).float() % 16
            signed = torch.where(nibble > 7, nibble - 16, nibble)
            weight[row] = (signed.view(scale.shape[1], -1) * scale[row].unsqueeze(1)).flatten()
        return weight
