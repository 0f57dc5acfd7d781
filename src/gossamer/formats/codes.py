"""A quantized matrix before packing: what a method decides, and what a format stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outliers:
    """Weights kept beside a quantized matrix, to be added to it: sorted by row, then by column, each place once."""

    rows: Tensor
    """int32 [n]"""
    columns: Tensor
    """int32 [n]"""
    values: Tensor
    """float32 [n]"""

    def __len__(self) -> int:
        return len(self.values)

    def between(self, start: int, stop: int) -> Outliers:
        """Those of rows start..stop, counted from `start`."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop], dtype=self.rows.dtype)).tolist()
        return Outliers(self.rows[first:last] - start, self.columns[first:last], self.values[first:last])

    def add_to(self, weight: Tensor) -> None:
        """Add them to a float32 weight [out, in], in its place."""
        weight.index_put_((self.rows.long(), self.columns.long()), self.values.to(weight.dtype), accumulate=True)


@dataclass(frozen=True)
class Codes:
    """Codes with what they stand for: (code - zero) * scale, or levels[code] * scale, and outliers on top."""

    codes: Tensor
    """[out, in]: int8 from -2^(bits-1) to 2^(bits-1) - 1, or an index into `levels`, int8 (uint8 of 8 bits)."""
    scale: Tensor
    """[out, groups], already rounded to what the format stores."""
    zero: Tensor | None = None
    """int8 [out, groups] if asymmetric, in the range of the codes."""
    levels: Tensor | None = None
    """float32 [levels] of all rows, or [out, levels]: those of each row."""
    outliers: Outliers | None = None

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in]."""
        (out, columns), groups = self.codes.shape, self.scale.shape[1]
        if self.levels is None:
            grouped = self.codes.view(out, groups, columns // groups).float()
            if self.zero is not None:
                grouped = grouped - self.zero.unsqueeze(-1).float()
        else:
            grouped = look_up(self.codes, self.levels).view(out, groups, columns // groups)
        weight = (grouped * self.scale.unsqueeze(-1).float()).view(out, columns)
        if self.outliers is not None:
            self.outliers.add_to(weight)
        return weight

    def zero_codes(self) -> Tensor:
        """int8, broadcast to [out, in]: the codes that stand for zero on a grid of integers."""
        assert self.levels is None
        columns, groups = self.codes.shape[1], self.scale.shape[1]
        if self.zero is None:
            return self.codes.new_zeros(1, 1)
        return self.zero.repeat_interleave(columns // groups, 1)

    def with_zeros(self, where: Tensor | None) -> Codes:
        """The same with zeros at some places [out, in] of a grid of integers; None: nowhere."""
        return self if where is None else replace(self, codes=torch.where(where, self.zero_codes(), self.codes))

    def split(self, sizes: list[int]) -> list[Codes]:
        """Consecutive parts of so many rows each."""
        parts, start = [], 0
        for size in sizes:
            stop = start + size
            parts.append(
                Codes(
                    self.codes[start:stop],
                    self.scale[start:stop],
                    None if self.zero is None else self.zero[start:stop],
                    self.levels[start:stop] if self.levels is not None and self.levels.ndim == 2 else self.levels,
                    None if self.outliers is None else self.outliers.between(start, stop),
                )
            )
            start = stop
        return parts

    @staticmethod
    def cat(parts: Sequence[Codes]) -> Codes:
        """The rows of all parts, which are of one format, one part after another."""
        levels = parts[0].levels
        if levels is not None and levels.ndim == 2:
            levels = _joined([p.levels for p in parts])
        return Codes(
            torch.cat([p.codes for p in parts]),
            torch.cat([p.scale for p in parts]),
            _joined([p.zero for p in parts]),
            levels,
            _joined_outliers(parts),
        )


def look_up(codes: Tensor, levels: Tensor) -> Tensor:
    """float32 [out, in]: the level of each code [out, in]; levels [levels] of all rows, or [out, levels]."""
    index = codes.int()  # bytes would be taken for a mask
    if levels.ndim == 2:
        index = index + torch.arange(len(levels), dtype=torch.int32).unsqueeze(1) * levels.shape[1]
    return levels.float().flatten().index_select(0, index.flatten()).view(codes.shape)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [p for p in parts if p is not None]
    return torch.cat(there) if there else None


def _joined_outliers(parts: Sequence[Codes]) -> Outliers | None:
    found, start = [], 0
    for p in parts:
        if p.outliers is not None:
            found.append((p.outliers.rows + start, p.outliers.columns, p.outliers.values))
        start += len(p.codes)
    if not found:
        return None
    rows, columns, values = (torch.cat(each) for each in zip(*found, strict=True))
    return Outliers(rows, columns, values)
