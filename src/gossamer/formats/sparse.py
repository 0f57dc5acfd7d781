"""A weight of which only what is not zero is stored: a bit for every weight, then the nonzeros, row after row.

The stored tensors of a weight [out, in] with n nonzeros, in a form of our own:
    weight_mask    uint8 [out, ceil(in / 8)]    bit c % 8 of byte c / 8 of a row: column c is not zero
    weight_values  fp32, fp16 or bf16 [n]       if `inner` is dense
    weight_packed  int32 [ceil(n * bits / 32)]  if it is integers: codes + 2^(bits-1), dense little-endian bits; scales
                                                and zero points of all columns beside them, as integer.py stores them
    weight_shape   int64 [2]
Where a row begins follows from the bits before it: no pointers are stored, for no pattern. compressed-tensors has
retired its sparse forms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import KernelError, ShapeMismatch
from ..kernels import dispatch
from .base import ROW_STEP, SHAPE, Format, Stored, Tensors, words
from .codes import Codes
from .dense import Dense
from .integer import Integer
from .outliers import Read

MASK, VALUES, PACKED = "weight_mask", "weight_values", "weight_packed"
RUN = 32
"""Codes that fill whole words, whatever their bits."""


@dataclass(frozen=True)
class Sparse(Format):
    """The nonzeros of a weight, as `inner` stores numbers; `sparsity` is the share of zeros."""

    inner: Dense | Integer
    sparsity: float
    """round(sparsity * out * in) zeros, as far as is known beforehand."""
    kept: int | None = field(default=None, compare=False)
    """How many nonzeros there are at most, where a stored weight says it."""

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Dense | Integer) or (isinstance(self.inner, Integer) and self.inner.outliers):
            raise ShapeMismatch(
                f"a sparse weight stores floats or integers, not {self.inner.name}",
                hint="after pruning: format int, and no outliers",
            )
        if not 0 <= self.sparsity < 1:
            raise ShapeMismatch(f"sparsity {self.sparsity} is not a share", hint="from 0 to below 1, 0.5 say")

    @property
    def name(self) -> str:
        return f"{self.inner.name}-sparse{round(100 * self.sparsity)}"

    @property
    def in_float(self) -> Sparse | None:
        return replace(self, inner=self.inner.in_float) if isinstance(self.inner, Dense) else None

    @property
    def grid(self) -> Format:
        return self.inner

    @property
    def numbers(self) -> str:
        """Local name of the tensor that holds the nonzeros."""
        return VALUES if isinstance(self.inner, Dense) else PACKED

    def found(self, inner: Format, length: int) -> Sparse:
        """The same with what a file says of it: `inner`, and so many entries of what holds the nonzeros."""
        assert isinstance(inner, Dense | Integer)
        return replace(self, inner=inner, kept=length if isinstance(inner, Dense) else length * 32 // inner.bits)

    def holding(self, inner: Format) -> Format:
        """The same zeros, with the nonzeros as `inner` stores them. Raises ShapeMismatch unless it is integers."""
        return Sparse(inner, self.sparsity)  # type: ignore[arg-type]

    def zeros(self, weight: Tensor) -> Tensor:
        return weight == 0

    def stored(self, shape: tuple[int, ...]) -> Stored:
        out, columns = shape
        n = out * columns - round(self.sparsity * out * columns) if self.kept is None else self.kept
        mask: Stored = {MASK: (torch.uint8, (out, -(-columns // 8))), SHAPE: (torch.int64, (2,))}
        if isinstance(self.inner, Dense):
            return mask | {VALUES: (self.inner.dtype, (n,))}
        return self.inner.stored(shape) | mask | {PACKED: (torch.int32, (words(n, self.inner.bits),))}

    def compress(self, weight: Tensor) -> dict[str, Tensor]:
        """Stored tensors of a float weight [out, in], if `inner` is dense."""
        assert isinstance(self.inner, Dense)
        rounded = weight.to(self.inner.dtype)
        there = rounded != 0
        return {MASK: _bits(there), VALUES: rounded[there], SHAPE: torch.tensor(weight.shape, dtype=torch.int64)}

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        inner = self._integer()
        there = codes.codes != codes.zero_codes()
        return inner.pack(codes) | {MASK: _bits(there), PACKED: _stream(codes.codes[there], inner.bits)}

    def filled(self, tensors: Tensors) -> dict[str, Tensor]:
        """Stored tensors of the same weight, zeros and all, as `inner` stores them. Raises KernelError."""
        if isinstance(self.inner, Integer):
            return self.inner.pack(self.codes(tensors))
        return {"weight": self.unpack(tensors).to(self.inner.dtype)}

    def codes(self, tensors: Tensors, rows: slice | None = None) -> Codes:
        inner, there = self._integer(), self._there(tensors)
        packed, n = tensors[PACKED], int(there.sum())
        if packed.dtype != torch.int32 or tuple(packed.shape) != (words(n, inner.bits),):
            raise KernelError(f"{self.name}: {PACKED} {list(packed.shape)} does not store the {n} nonzeros of {MASK}")
        whole = torch.zeros(there.shape, dtype=torch.int8).masked_scatter_(there, _codes(packed, inner.bits, n))
        codes = inner.codes({**tensors, PACKED: dispatch.pack_codes(whole, inner.bits)}, rows)
        return codes.with_zeros(~there if rows is None else ~there[rows])

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> Tensor:
        if isinstance(self.inner, Integer):
            return self.codes(tensors, rows).dequantize()
        there, values = self._there(tensors), tensors[VALUES]
        if values.dtype != self.inner.dtype or tuple(values.shape) != (int(there.sum()),):
            raise KernelError(
                f"{self.name}: {VALUES} {values.dtype} {list(values.shape)} does not store the {int(there.sum())} "
                f"nonzeros of {MASK}"
            )
        weight = torch.zeros(there.shape).masked_scatter_(there, values.float())
        return weight if rows is None else weight[rows]

    def read(self, shape: tuple[int, ...], start: int, stop: int, read: Read) -> Tensor:
        first, columns = start // ROW_STEP * ROW_STEP, shape[1]
        passed = int(np.bitwise_count(read(MASK, slice(0, first)).numpy()).sum())
        tensors = {SHAPE: torch.tensor([stop - first, columns]), MASK: read(MASK, slice(first, stop))}
        n = int(np.bitwise_count(tensors[MASK].numpy()).sum())
        if isinstance(self.inner, Dense):
            tensors[VALUES] = read(VALUES, slice(passed, passed + n))
        else:
            bits, skipped = self.inner.bits, passed % RUN
            packed = read(PACKED, slice(words(passed - skipped, bits), words(passed + n, bits)))
            tensors[PACKED] = _stream(_codes(packed, bits, skipped + n)[skipped:], bits)
            before, upto = self.inner.stored((first, columns)), self.inner.stored((stop, columns))
            for local in before.keys() - tensors.keys():
                tensors[local] = read(local, slice(before[local][1][0], upto[local][1][0]))
        return self.unpack(tensors, slice(start - first, stop - first))

    # What rounding needs to know of a grid is what the integers say.

    @property
    def group_size(self) -> int | None:  # type: ignore[override]
        return self.inner.group_size

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._integer().scale_dtype

    @property
    def shares(self) -> list[float]:
        return self._integer().shares

    @property
    def reach(self) -> float:
        return self._integer().reach

    def round(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self._integer().round(values, scale, zero)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self._integer().value(codes, scale, zero)

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._integer().fit(low, high)

    def assemble(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Codes:
        return self._integer().assemble(codes, scale, zero)

    def _integer(self) -> Integer:
        if not isinstance(self.inner, Integer):
            self._has_none("codes")
        return self.inner

    def _there(self, tensors: Tensors) -> Tensor:
        """bool [out, in]: which weights are stored. Raises KernelError on tensors that make no sense."""
        missing = [local for local in (MASK, SHAPE, self.numbers) if local not in tensors]
        if missing:
            raise KernelError(f"{self.name}: {missing[0]} is missing")
        mask, said = tensors[MASK], tensors[SHAPE].tolist()
        out, columns = (int(n) for n in said) if len(said) == 2 else (-1, -1)
        if columns < 1 or mask.dtype != torch.uint8 or tuple(mask.shape) != (out, -(-columns // 8)):
            raise KernelError(f"{self.name}: {MASK} {mask.dtype} {list(mask.shape)} does not fit a weight {said}")
        bits = torch.from_numpy(np.unpackbits(mask.numpy(), axis=1, bitorder="little")).bool()
        if bool(bits[:, columns:].any()):
            raise KernelError(f"{self.name}: {MASK} has bits behind column {columns}")
        return bits[:, :columns]


def _bits(there: Tensor) -> Tensor:
    """uint8 [out, ceil(in / 8)] of bool [out, in]."""
    return torch.from_numpy(np.packbits(there.numpy(), axis=1, bitorder="little"))


def _stream(codes: Tensor, bits: int) -> Tensor:
    """int32 words of codes int8 [n], one after another."""
    return dispatch.pack_codes(codes.unsqueeze(0), bits)[0] if len(codes) else torch.zeros(0, dtype=torch.int32)


def _codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """int8 [n] of a stream of words."""
    return dispatch.unpack_codes(packed.unsqueeze(0), bits, n)[0] if n else torch.zeros(0, dtype=torch.int8)
