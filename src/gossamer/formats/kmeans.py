"""Levels of a row's own, found by k-means, and a few weights kept beside them (SqueezeLLM, arXiv 2306.07629).

The stored tensors of a weight [out, in], in a form of our own:
    weight_packed  int32 [out, ceil(in * bits / 32)]  indices of levels, dense little-endian bits
    weight_levels  fp16  [out, 2^bits]
    weight_shape   int64 [2]
and, if weights are kept beside them, what outliers.py stores; they are added to the levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import KernelError, ShapeMismatch
from ..kernels import dispatch
from .base import SHAPE, Format, Stored, Tensors, words
from .codes import Codes
from .outliers import pack_outliers, stored_outliers, unpack_outliers

MAX_BITS = 7
"""An index is an int8."""


@dataclass(frozen=True)
class KMeans(Format):
    """2^bits fp16 levels for each row; `outlier_share` of the weights is kept beside them, in bf16."""

    bits: int
    outlier_share: float = 0.0
    """round(outlier_share * in) of each row, as far as is known beforehand."""
    kept: int | None = field(default=None, compare=False)
    """How many there are, where a stored weight says it."""

    group_size = None
    scale_dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ShapeMismatch(f"k-means with {self.bits} bits is not a format", hint=f"1 to {MAX_BITS} bits are")
        if not 0 <= self.outlier_share < 1:
            raise ShapeMismatch(f"outlier_share {self.outlier_share} is not a share", hint="0 to 1, 0.005 say")

    @property
    def name(self) -> str:
        return f"kmeans{self.bits}" + ("-outliers" if self.outliers else "")

    @property
    def outliers(self) -> bool:
        """True if weights are kept beside the levels."""
        return self.outlier_share > 0

    def stored(self, shape: tuple[int, ...]) -> Stored:
        out, columns = shape
        tensors: Stored = {
            "weight_packed": (torch.int32, (out, words(columns, self.bits))),
            "weight_levels": (torch.float16, (out, 2**self.bits)),
            SHAPE: (torch.int64, (2,)),
        }
        if self.outliers:
            expected = out * round(self.outlier_share * columns)
            tensors |= stored_outliers(expected if self.kept is None else self.kept, shape)
        return tensors

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        shape = tuple(codes.codes.shape)
        levels = codes.levels
        if levels is None or tuple(levels.shape) != (shape[0], 2**self.bits) or bool((codes.scale != 1).any()):
            raise KernelError(f"{self.name} stores {2**self.bits} levels of each row, and scales that are all 1")
        tensors = {
            "weight_packed": dispatch.pack_codes(codes.codes - 2 ** (self.bits - 1), self.bits),
            "weight_levels": levels.half().contiguous(),
            SHAPE: torch.tensor(shape, dtype=torch.int64),
        }
        if self.outliers:
            tensors |= pack_outliers(codes.outliers, shape)
        elif codes.outliers is not None and len(codes.outliers):
            raise KernelError(f"{self.name} keeps no outliers, {len(codes.outliers)} were given")
        return tensors

    def codes(self, tensors: Tensors, rows: slice | None = None) -> Codes:
        shape = self._shape(tensors)
        outliers = unpack_outliers(tensors, shape) if self.outliers else None
        packed, levels = tensors["weight_packed"], tensors["weight_levels"].float()
        if rows is not None:
            packed, levels = packed[rows], levels[rows]
            outliers = None if outliers is None else outliers.between(*rows.indices(shape[0])[:2])
        index = dispatch.unpack_codes(packed.contiguous(), self.bits, shape[1]) + 2 ** (self.bits - 1)
        return Codes(index, torch.ones(len(index), 1), None, levels, outliers)

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> Tensor:
        return self.codes(tensors, rows).dequantize()

    def _shape(self, tensors: Tensors) -> tuple[int, int]:
        missing = [n for n in ("weight_packed", "weight_levels", SHAPE) if n not in tensors]
        if missing:
            raise KernelError(f"{self.name}: {missing[0]} is missing")
        said, packed, levels = tensors[SHAPE].tolist(), tensors["weight_packed"], tensors["weight_levels"]
        out, columns = (int(n) for n in said) if len(said) == 2 else (-1, -1)
        if columns < 1 or tuple(packed.shape) != (out, words(columns, self.bits)):
            raise KernelError(f"{self.name}: weight_packed {tuple(packed.shape)} does not store a weight {said}")
        if tuple(levels.shape) != (out, 2**self.bits):
            raise KernelError(f"{self.name}: weight_levels {tuple(levels.shape)} does not fit a weight {said}")
        return out, columns
