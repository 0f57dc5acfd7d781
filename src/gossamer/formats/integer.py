"""Integers of 2 to 8 bits with one scale for each group of columns (or row), stored as compressed-tensors stores them.

The stored tensors of a weight [out, in] with groups of g columns (`pack-quantized`, compressed-tensors 0.20):
    weight_packed      int32 [out, ceil(in * bits / 32)]     codes + 2^(bits-1), dense little-endian bits
    weight_scale       bf16  [out, in / g]
    weight_zero_point  int32 [ceil(out * bits / 32), in / g] only if asymmetric; packed down the rows
    weight_shape       int64 [2]
and the weight is (code - zero_point) * scale. With `outliers`, what outliers.py stores is added to it: the columns that
LLM.int8() keeps (arXiv 2208.07339), or single weights. compressed-tensors knows no outliers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import KernelError, ShapeMismatch
from ..kernels import dispatch
from .base import Format, Stored, Tensors, nearest_group_size, shares, words
from .codes import Codes
from .outliers import pack_outliers, stored_outliers, unpack_outliers

__all__ = ["Codes", "Integer", "nearest_group_size"]


@dataclass(frozen=True)
class Integer(Format):
    """`bits` per weight, a bf16 scale per `group_size` columns (None: per row), a zero point unless symmetric."""

    bits: int
    group_size: int | None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    outliers: bool = False
    """Some weights are kept beside the integers, in bf16."""
    outlier_share: float = 0.0
    """How many, as far as is known beforehand: round(outlier_share * in) of each row."""
    kept: int | None = field(default=None, compare=False)
    """How many there are, where a stored weight says it."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ShapeMismatch(f"integers of {self.bits} bits are not a format", hint="2 to 8 bits are")
        if not 0 <= self.outlier_share <= 1 or (self.outlier_share and not self.outliers):
            raise ShapeMismatch(f"outlier_share {self.outlier_share} with outliers={self.outliers} is not a format")

    @property
    def name(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        name = f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")
        return f"{name}-outliers" if self.outliers else name

    def stored(self, shape: tuple[int, ...]) -> Stored:
        out, columns = shape
        groups = self.groups(columns)
        tensors: Stored = {
            "weight_packed": (torch.int32, (out, words(columns, self.bits))),
            "weight_scale": (self.scale_dtype, (out, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = (torch.int32, (words(out, self.bits), groups))
        if self.outliers:
            expected = out * round(self.outlier_share * columns)
            tensors |= stored_outliers(expected if self.kept is None else self.kept, shape)
        return tensors

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        tensors = {
            "weight_packed": dispatch.pack_codes(codes.codes, self.bits),
            "weight_scale": codes.scale.to(self.scale_dtype).contiguous(),
            "weight_shape": torch.tensor(codes.codes.shape, dtype=torch.int64),
        }
        if not self.symmetric:
            assert codes.zero is not None
            tensors["weight_zero_point"] = dispatch.pack_codes(codes.zero.T.contiguous(), self.bits).T.contiguous()
        if self.outliers:
            tensors |= pack_outliers(codes.outliers, tuple(codes.codes.shape))
        elif codes.outliers is not None:
            raise KernelError(f"{self.name} keeps no outliers, {len(codes.outliers)} were given")
        return tensors

    def codes(self, tensors: Tensors, rows: slice | None = None) -> Codes:
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        out, columns = self._shape(tensors)
        zero = None
        if not self.symmetric:
            stored = tensors["weight_zero_point"]
            zero = dispatch.unpack_codes(stored.T.contiguous(), self.bits, out).T
        outliers = unpack_outliers(tensors, (out, columns)) if self.outliers else None
        if rows is not None:
            packed, scale, zero = packed[rows], scale[rows], None if zero is None else zero[rows]
            outliers = None if outliers is None else outliers.between(*rows.indices(out)[:2])
        return Codes(dispatch.unpack_codes(packed.contiguous(), self.bits, columns), scale, zero, None, outliers)

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> Tensor:
        return self.codes(tensors, rows).dequantize()

    def round(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        steps = values / scale
        return (steps if zero is None else steps + zero).round_().clamp_(*self._range)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (codes if zero is None else codes - zero) * scale

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            # 2^bits - 1 steps over twice the largest weight: all codes are used, and only the largest is clipped.
            scale = torch.maximum(high, -low).clamp(min=0) / ((2**self.bits - 1) / 2)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / (2**self.bits - 1)
        zero = torch.zeros_like(scale)
        scale = scale.to(self.scale_dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros still needs a scale to divide by
        if not self.symmetric:
            zero = (-(2 ** (self.bits - 1)) - low / scale).round().clamp(*self._range)
        return scale, zero

    def assemble(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Codes:
        return Codes(codes.to(torch.int8), scale, None if self.symmetric else zero.to(torch.int8))

    @property
    def shares(self) -> list[float]:
        # A symmetric grid whose steps cover the range evenly clips the largest weight by half a step: begin above it.
        return shares((2**self.bits - 1) / (2**self.bits - 2) if self.symmetric else 1.0)

    @property
    def reach(self) -> float:
        return float(2 ** (self.bits - 1) if self.symmetric else 2**self.bits - 1)

    @property
    def _range(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def _shape(self, tensors: Tensors) -> tuple[int, int]:
        packed, scale, shape = tensors["weight_packed"], tensors["weight_scale"], tensors["weight_shape"].tolist()
        out, columns = (int(n) for n in shape) if len(shape) == 2 else (-1, -1)
        if out != packed.shape[0] or columns < 1 or packed.shape[1] != words(columns, self.bits):
            raise KernelError(f"{self.name}: weight_packed {tuple(packed.shape)} does not store a weight {shape}")
        if tuple(scale.shape) != (out, self.groups(columns)):
            raise KernelError(f"{self.name}: weight_scale {tuple(scale.shape)} does not fit a weight {shape}")
        zero = tensors.get("weight_zero_point")
        if not self.symmetric and (zero is None or tuple(zero.shape) != (words(out, self.bits), self.groups(columns))):
            found = "missing" if zero is None else tuple(zero.shape)
            raise KernelError(f"{self.name}: weight_zero_point {found} does not fit a weight {shape}")
        return out, columns
