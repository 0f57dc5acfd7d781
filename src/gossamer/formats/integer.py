"""Integers of 2 to 8 bits with one scale for each group of columns (or row), stored as compressed-tensors stores them.

The stored tensors of a weight [out, in] with groups of g columns (`pack-quantized`, compressed-tensors 0.20):
    weight_packed      int32 [out, ceil(in * bits / 32)]     codes + 2^(bits-1), dense little-endian bits
    weight_scale       bf16  [out, in / g]
    weight_zero_point  int32 [ceil(out * bits / 32), in / g] only if asymmetric; packed down the rows
    weight_shape       int64 [2]
and the weight is (code - zero_point) * scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import KernelError, ShapeMismatch
from ..kernels import dispatch
from .base import Format, Tensors


@dataclass(frozen=True)
class Codes:
    """A quantized matrix before packing: what a method decides."""

    codes: torch.Tensor
    """int8 [out, in], from -2^(bits-1) to 2^(bits-1) - 1."""
    scale: torch.Tensor
    """[out, groups], already rounded to the format's scale dtype."""
    zero: torch.Tensor | None = None
    """int8 [out, groups] if asymmetric, in the range of the codes."""

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [out, in]."""
        out, columns = self.codes.shape
        grouped = self.codes.view(out, self.scale.shape[1], -1).float()
        if self.zero is not None:
            grouped = grouped - self.zero.unsqueeze(-1).float()
        return (grouped * self.scale.unsqueeze(-1).float()).view(out, columns)


@dataclass(frozen=True)
class Integer(Format):
    """`bits` per weight, a bf16 scale per `group_size` columns (None: per row), a zero point unless symmetric."""

    bits: int
    group_size: int | None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ShapeMismatch(f"integers of {self.bits} bits are not a format", hint="2 to 8 bits are")

    @property
    def name(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")

    def groups(self, columns: int) -> int:
        """Number of groups in a row. Raises ShapeMismatch, with the nearest group size that divides the row."""
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise ShapeMismatch(
                f"group_size {self.group_size} does not divide {columns} columns",
                hint=f"nearest that does: {nearest_group_size(self.group_size, [columns])}",
            )
        return columns // self.group_size

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        out, columns = shape
        groups = self.groups(columns)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (out, _words(columns, self.bits))),
            "weight_scale": (self.scale_dtype, (out, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = (torch.int32, (_words(out, self.bits), groups))
        return tensors

    def pack(self, q: Codes) -> dict[str, torch.Tensor]:
        """Stored tensors of a quantized matrix."""
        tensors = {
            "weight_packed": dispatch.pack_codes(q.codes, self.bits),
            "weight_scale": q.scale.to(self.scale_dtype).contiguous(),
            "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
        }
        if not self.symmetric:
            assert q.zero is not None
            tensors["weight_zero_point"] = dispatch.pack_codes(q.zero.T.contiguous(), self.bits).T.contiguous()
        return tensors

    def codes(self, tensors: Tensors, rows: slice | None = None) -> Codes:
        """Codes, scales and zero points from the stored tensors; `rows` selects rows of the weight."""
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        out, columns = self._shape(tensors)
        zero = None
        if not self.symmetric:
            words = tensors["weight_zero_point"]
            zero = dispatch.unpack_codes(words.T.contiguous(), self.bits, out).T
        if rows is not None:
            packed, scale, zero = packed[rows], scale[rows], None if zero is None else zero[rows]
        return Codes(dispatch.unpack_codes(packed.contiguous(), self.bits, columns), scale, zero)

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> torch.Tensor:
        return self.codes(tensors, rows).dequantize()

    def _shape(self, tensors: Tensors) -> tuple[int, int]:
        packed, scale, shape = tensors["weight_packed"], tensors["weight_scale"], tensors["weight_shape"].tolist()
        out, columns = (int(n) for n in shape) if len(shape) == 2 else (-1, -1)
        if out != packed.shape[0] or columns < 1 or packed.shape[1] != _words(columns, self.bits):
            raise KernelError(f"{self.name}: weight_packed {tuple(packed.shape)} does not store a weight {shape}")
        if tuple(scale.shape) != (out, self.groups(columns)):
            raise KernelError(f"{self.name}: weight_scale {tuple(scale.shape)} does not fit a weight {shape}")
        return out, columns


def nearest_group_size(wanted: int, columns: list[int]) -> int:
    """The divisor common to all these row lengths that is nearest to `wanted`, multiples of 8 before all others."""
    common = columns[0]
    for n in columns[1:]:
        common = math.gcd(common, n)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    handy = [d for d in divisors if d % 8 == 0] or divisors
    return min(handy, key=lambda d: (abs(d - wanted), d))


def _words(count: int, bits: int) -> int:
    return (count * bits + 31) // 32
