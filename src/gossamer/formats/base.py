"""The contract of a weight format: how a float matrix becomes named tensors on disk, and back.

A format knows nothing of models, files or methods. A *method* chooses codes and scales; the format stores them, and
says which numbers codes can stand for: that is all that rounding, the search for ranges and GPTQ know of it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..errors import KernelError, ShapeMismatch
from .codes import Codes
from .outliers import OUTLIERS, POINTERS, Read, read_outliers

Tensors: TypeAlias = Mapping[str, Tensor]
"""The stored form of one weight: local tensor name (`weight`, `weight_packed`, ...) to tensor."""
Stored: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Local tensor name -> dtype and shape."""
SHAPE = "weight_shape"
"""Stored beside codes that are packed into words: int64 [2], the shape of the weight."""
CLIP_STEPS = 24
SMALLEST_RANGE = 0.45
"""A search tries CLIP_STEPS ranges, from one that clips little or nothing down to this share of a group's own."""
ROW_STEP = 32
"""Rows that every stored tensor can be cut after: 32 rows of zero points fill whole words, whatever their bits."""


class Format(abc.ABC):
    """One way to store a weight matrix [out_features, in_features]."""

    group_size: int | None
    """Columns that share a scale; None: the whole row."""
    scale_dtype: torch.dtype
    fixed_scales: bool = False
    """Scales are of just one dtype, not of any float's."""
    code_dtype: torch.dtype = torch.int8
    uncut: ClassVar[frozenset[str]] = frozenset()
    """Stored tensors that belong to no row."""

    @property
    def in_float(self) -> Format | None:
        """The same form with its numbers in float32, whose `unpack` passes gradients to them; None if it has codes."""
        return None

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short and exact, such as `bf16`, `int4-g64`, `int8-channel-asym`, `nf4-g64-dq`."""

    @property
    def grid(self) -> Format:
        """The format whose numbers codes stand for: this one, or the one inside of it."""
        return self

    def zeros(self, weight: Tensor) -> Tensor | None:
        """bool [out, in]: where a weight must stay zero however it is rounded; None: nowhere."""
        return None

    @abc.abstractmethod
    def stored(self, shape: tuple[int, ...]) -> Stored:
        """Local name, dtype and shape of every tensor that stores a weight of this shape. Raises ShapeMismatch."""

    @abc.abstractmethod
    def unpack(self, tensors: Tensors, rows: slice | None = None) -> Tensor:
        """The float32 weight [out_features, in_features] (or these rows of it). Raises KernelError on bad tensors."""

    def holding(self, inner: Format) -> Format:
        """How a weight of this form is stored once `inner` stores its numbers; here: as `inner` alone."""
        return inner

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        """Stored tensors of a quantized matrix."""
        self._has_none("codes")

    def codes(self, tensors: Tensors, rows: slice | None = None) -> Codes:
        """What the stored tensors hold; `rows` selects rows of the weight. Raises KernelError on bad tensors."""
        self._has_none("codes")

    def round(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes (whole float32 numbers) nearest to `values`; all arguments broadcast."""
        self._has_none("scales for groups")

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What codes stand for; all arguments broadcast."""
        self._has_none("scales for groups")

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of groups whose weights lie between `low` and `high`, rounded to what is stored.

        All are float32 of one shape. Zero points are whole numbers in the range of the codes, 0 if symmetric.
        """
        self._has_none("scales for groups")

    def assemble(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Codes:
        """Codes [out, in], whole numbers of any dtype, with the grid that they were rounded to, [out, groups]."""
        self._has_none("scales for groups")

    @property
    def shares(self) -> Sequence[float]:
        """Parts of a group's own range that a search for the grid of least error tries, besides the whole of it."""
        return shares(1.0)

    @property
    def reach(self) -> float:
        """Largest distance between what two codes, or a code and zero, stand for, in scales."""
        self._has_none("scales for groups")

    def read(self, shape: tuple[int, ...], start: int, stop: int, read: Read) -> Tensor:
        """Rows start..stop of a weight of this shape in float32, reading little more than them."""
        first = start // ROW_STEP * ROW_STEP
        before, upto = self.stored((first, *shape[1:])), self.stored((stop, *shape[1:]))
        tensors = {}
        for local, (_, stored_shape) in self.stored(shape).items():
            if local == SHAPE:
                tensors[local] = torch.tensor([stop - first, *shape[1:]])
            elif local in self.uncut:
                tensors[local] = read(local, slice(0, stored_shape[0]))
            elif local not in OUTLIERS:
                tensors[local] = read(local, slice(before[local][1][0], upto[local][1][0]))
        if POINTERS in before:
            tensors |= read_outliers(read, first, stop)
        return self.unpack(tensors, slice(start - first, stop - first))

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

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of this shape takes, scales and zero points counted."""
        return sum(math.prod(stored) * dtype.itemsize for dtype, stored in self.stored(shape).values())

    def parameters(self, shape: tuple[int, ...]) -> int:
        """How many numbers stand for a weight of this shape: those of the weight itself, or of its factors."""
        return math.prod(shape)

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits over the number of weights, scales and zero points counted."""
        return self.nbytes(shape) * 8 / math.prod(shape)

    def _has_none(self, what: str) -> NoReturn:
        raise KernelError(f"the format {self.name} has no {what}")


def shares(widest: float) -> list[float]:
    """CLIP_STEPS parts of a range, evenly from `widest` down to SMALLEST_RANGE, without the whole of it."""
    every = [widest + (SMALLEST_RANGE - widest) * step / (CLIP_STEPS - 1) for step in range(CLIP_STEPS)]
    return [share for share in every if share != 1.0]


def nearest_group_size(wanted: int, columns: list[int]) -> int:
    """The divisor common to all these row lengths that is nearest to `wanted`, multiples of 8 before all others."""
    common = columns[0]
    for n in columns[1:]:
        common = math.gcd(common, n)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    handy = [d for d in divisors if d % 8 == 0] or divisors
    return min(handy, key=lambda d: (abs(d - wanted), d))


def words(count: int, bits: int) -> int:
    """int32 words that hold so many codes."""
    return (count * bits + 31) // 32


def check_tensors(form: Format, tensors: Tensors, shape: tuple[int, ...]) -> None:
    """Raises KernelError unless every tensor that stores a weight of this shape is there as the format says."""
    for name, (dtype, wanted) in form.stored(shape).items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != wanted:
            arrived = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise KernelError(f"{form.name}: {name} is {arrived}, a weight {list(shape)} needs {dtype} {list(wanted)}")
