"""Folders in the `gemm` layout of AWQ, for ExLlama, vLLM, SGLang: 4 bits in one grid for all layers.

qweight  int32 [in, out / 8]       codes from 0; nibbles of a word hold its rows 0 2 4 6 1 3 5 7
qzeros   int32 [groups, out / 8]   zero points, the same
scales   float16 [groups, out]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Entry
from ..errors import ExportError
from ..formats import Integer
from .base import Options, form_of, stored_of
from .folders import FolderExport, FolderReader, lazy, one_grid
from .grids import as_half, unsigned, zeros

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AWQExport(FolderExport):
    """A folder in AWQ's layout."""

    target = "awq"
    layouts = ("gemm",)
    engine = "gptqmodel"

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self.grid = one_grid(checkpoint, self.target, "integers of 4 bits")
        super().__init__(checkpoint, options)
        if self.grid.bits != 4:
            raise ExportError(
                f"{self.target}: integers of {self.grid.bits} bits are not in this layout, 4 bits are",
                hint="recipes: int4-awq, int4-gptq; --to gptq takes 2, 3 and 8 bits, too",
            )
        for name in checkpoint.names():
            if self.is_packed(name):
                self._check(name)

    def is_packed(self, name: str) -> bool:
        return isinstance(form_of(self.checkpoint, name), Integer) and ".layers." in name

    def packed(self, name: str) -> list[Entry]:
        out, columns = self.checkpoint.shape(name)
        groups, module = self.grid.groups(columns), name.removesuffix(".weight")
        return [
            lazy(f"{module}.qweight", torch.int32, (columns, out // 8), lambda: self._qweight(name)),
            lazy(f"{module}.qzeros", torch.int32, (groups, out // 8), lambda: self._qzeros(name)),
            lazy(f"{module}.scales", torch.float16, (groups, out), lambda: self._codes(name).scale.half().T),
        ]

    def quantization_config(self) -> dict[str, Any] | None:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": -1 if self.grid.group_size is None else self.grid.group_size,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": ["lm_head"],
        }

    def reader(self, path: Path) -> AWQReader:
        return AWQReader(path)

    def _check(self, name: str) -> None:
        out = self.checkpoint.shape(name)[0]
        if out % 8:
            raise ExportError(
                f"{self.target}: {name} has {out} rows, and 8 go into a word", hint="--to gguf or vllm take it"
            )
        if as_half(self._codes(name).scale) is None:
            raise ExportError(
                f"{self.target}: the scales of {name} are not exact in float16", hint="--to vllm keeps them as they are"
            )

    def _codes(self, name: str) -> Any:
        return form_of(self.checkpoint, name).codes(stored_of(self.checkpoint, name))

    def _qweight(self, name: str) -> Tensor:
        return pack_along(unsigned(self.grid, self._codes(name).codes).T)

    def _qzeros(self, name: str) -> Tensor:
        return pack_along(zeros(self.grid, self._codes(name)).T)


def pack_along(codes: Tensor) -> Tensor:
    """int32 [n, out / 8] from codes from 0 [n, out]: nibble i of a word holds its row ORDER[i]."""
    rows = codes.long().reshape(len(codes), -1, 8)[:, :, list(ORDER)]
    return (rows << (4 * torch.arange(8))).sum(-1).to(torch.int32)


class AWQReader(FolderReader):
    """The layout read row by row: row r of a word is in the nibble r / 2, or, if r is odd, 4 + (r - 1) / 2."""

    def unpacked(self, module: str) -> Tensor:
        scales = self.tensor(f"{module}.scales").float().T  # [out, groups]
        codes = self._rows(self.tensor(f"{module}.qweight"))
        zero = self._rows(self.tensor(f"{module}.qzeros"))
        width = codes.shape[1] // zero.shape[1]
        steps = codes.view(*zero.shape, width) - zero.unsqueeze(-1)
        return (steps * scales.unsqueeze(-1)).flatten(1)

    def _rows(self, words: Tensor) -> Tensor:
        """int32 [out, n] of words [n, out / 8]."""
        rows = []
        for row in range(words.shape[1] * 8):
            word, place = divmod(row, 8)
            nibble = place // 2 + 4 * (place % 2)
            rows.append(words[:, word] >> (4 * nibble) & 15)
        return torch.stack(rows)
