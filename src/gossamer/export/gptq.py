"""Folders in the layout of GPTQ, for ExLlama, vLLM, SGLang, GPTQModel: 2, 3, 4 or 8 bits in one grid for all layers.

    qweight  int32 [in * bits / 32, out]       codes from 0, one stream of bits down each column
    qzeros   int32 [groups, out * bits / 32]   zero points along each row; less one in version 1
    scales   float16 [groups, out]
    g_idx    int32 [in]                        group of each input
`gptq` says version 1 and `gptq_v2` version 2. Version 1 cannot say a zero point of 0: 0 - 1 is stored as all ones, to
which some readers add 1 and get 16, and others 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Entry
from ..checkpoint.files import read_json
from ..errors import ExportError
from ..formats import Integer
from .base import Options, form_of, stored_of
from .folders import FolderExport, FolderReader, lazy, one_grid
from .grids import as_half, unsigned, zeros

BITS = (2, 3, 4, 8)


class GPTQExport(FolderExport):
    """A folder in GPTQ's layout."""

    target = "gptq"
    layouts = ("gptq", "gptq_v2")
    engine = "gptqmodel"

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self.grid = one_grid(checkpoint, self.target, "integers of 2, 3, 4 or 8 bits")
        super().__init__(checkpoint, options)
        if self.grid.bits not in BITS:
            raise ExportError(
                f"{self.target}: integers of {self.grid.bits} bits are not in this layout, {BITS} are",
                hint="recipes: int4-gptq, int3-gptq, int8-rtn",
            )
        for name in checkpoint.names():
            if self.is_packed(name):
                self._check(name)

    def is_packed(self, name: str) -> bool:
        return isinstance(form_of(self.checkpoint, name), Integer) and ".layers." in name

    def packed(self, name: str) -> list[Entry]:
        out, columns = self.checkpoint.shape(name)
        bits, groups = self.grid.bits, self.grid.groups(columns)
        module = name.removesuffix(".weight")
        return [
            lazy(f"{module}.qweight", torch.int32, (columns * bits // 32, out), lambda: self._qweight(name)),
            lazy(f"{module}.qzeros", torch.int32, (groups, out * bits // 32), lambda: self._qzeros(name)),
            lazy(f"{module}.scales", torch.float16, (groups, out), lambda: self._codes(name).scale.half().T),
            lazy(f"{module}.g_idx", torch.int32, (columns,), lambda: (torch.arange(columns) * groups // columns).int()),
        ]

    def quantization_config(self) -> dict[str, Any] | None:
        return {
            "quant_method": "gptq",
            "bits": self.grid.bits,
            "group_size": -1 if self.grid.group_size is None else self.grid.group_size,
            "sym": self.grid.symmetric,
            "desc_act": False,
            "checkpoint_format": self.layout,
            "format": self.layout,
            "lm_head": False,
            "pack_dtype": "int32",
        }

    def write(self, path: Path, progress: Any) -> None:
        super().write(path, progress)
        _write_json(path / "quantize_config.json", self.quantization_config())

    def reader(self, path: Path) -> GPTQReader:
        return GPTQReader(path)

    def _check(self, name: str) -> None:
        out, columns = self.checkpoint.shape(name)
        bits = self.grid.bits
        for what, count in (("rows", out), ("columns", columns)):
            if count % 32:
                raise ExportError(
                    f"{self.target}: {name} has {count} {what}, and codes are packed 32 at a time",
                    hint="--to gguf or vllm take it",
                )
        codes = self._codes(name)
        if as_half(codes.scale) is None:
            raise ExportError(
                f"{self.target}: the scales of {name} are not exact in float16", hint="--to vllm keeps them as they are"
            )
        if self.layout == "gptq" and int(zeros(self.grid, codes).min()) == 0:
            raise ExportError(
                f"{self.target}: {name} has a zero point of 0, which version 1 of the layout cannot say: some "
                f"readers take it for {1 << bits}",
                hint="--layout gptq_v2 says it, or quantize with symmetric: true",
            )

    def _codes(self, name: str) -> Any:
        return form_of(self.checkpoint, name).codes(stored_of(self.checkpoint, name))

    def _qweight(self, name: str) -> Tensor:
        return pack_down(unsigned(self.grid, self._codes(name).codes).T, self.grid.bits)

    def _qzeros(self, name: str) -> Tensor:
        less = 1 if self.layout == "gptq" else 0
        return pack_down(zeros(self.grid, self._codes(name)) - less, self.grid.bits).T


def pack_down(codes: Tensor, bits: int) -> Tensor:
    """int32 [n * bits / 32, columns] from codes from 0 [n, columns]: one stream of bits down each column, low first."""
    count, columns = codes.shape
    words = torch.zeros(count * bits // 32 + 1, columns, dtype=torch.int64)
    first = torch.arange(count) * bits
    shifted = codes.long() << (first % 32).unsqueeze(1)
    words.index_add_(0, first // 32, shifted & 0xFFFFFFFF)
    words.index_add_(0, first // 32 + 1, shifted >> 32)
    return words[:-1].to(torch.int32)


class GPTQReader(FolderReader):
    """The layout read bit by bit: place i of a stream is bits i * bits to (i + 1) * bits of its words."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        said = read_json(folder / "config.json")["quantization_config"]
        self._bits, self._more = int(said["bits"]), {"gptq": 1, "gptq_v2": 0}[said["checkpoint_format"]]

    def unpacked(self, module: str) -> Tensor:
        qweight, qzeros, scales, group = (
            self.tensor(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        codes = self._stream(qweight.T)  # [out, in]
        zero = self._stream(qzeros) + self._more  # [groups, out]
        of_column = group.long()
        return (codes - zero.T[:, of_column]).float() * scales.float().T[:, of_column]

    def _stream(self, words: Tensor) -> Tensor:
        """int64 [n, words * 32 / bits] of int32 words [n, words]."""
        places = torch.arange(32)
        flat = (words.unsqueeze(-1) >> places & 1).flatten(1)  # every bit by itself
        weights = 2 ** torch.arange(self._bits)
        return (flat.view(len(words), -1, self._bits) * weights).sum(-1)


def _write_json(path: Path, value: Any) -> None:
    import json

    from ..checkpoint import write_file

    write_file(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")
