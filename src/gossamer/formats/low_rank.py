"""Two factors in the place of a matrix: W = U V, of a rank that makes both together smaller than it.

The stored tensors of a weight [out, in] are those of `inner` for U [out, rank] and for V [rank, in], their names begun
by `weight_u` and `weight_v` in the place of `weight`: two dense tensors, or codes and scales of each.
A layer multiplies by V, then by U; the product is made only where someone asks for the whole matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import ShapeMismatch
from .base import Format, Stored, Tensors
from .codebook import Codebook
from .dense import Dense
from .integer import Integer
from .kmeans import KMeans
from .outliers import Read

Side = Literal["u", "v"]
SMALLEST_GROUP = 8
"""Columns of U that share a scale where a group of V does not divide the rank: fewer would cost more than they save."""


@dataclass(frozen=True)
class LowRank(Format):
    """W = U V with U [out, rank] and V [rank, in], each stored in `inner`."""

    rank: int
    inner: Format = field(default_factory=Dense)

    group_size = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ShapeMismatch(f"factors of rank {self.rank} are no format", hint="the smallest rank is 1")
        if not isinstance(self.inner, Dense | Integer | Codebook | KMeans):
            raise ShapeMismatch(f"factors cannot be stored as {self.inner.name}", hint="floats or codes can")
        if isinstance(self.inner, Integer | KMeans) and self.inner.outliers:
            raise ShapeMismatch(
                f"factors keep no outliers, and {self.inner.name} does", hint="a method without outliers: gptq, rtn"
            )

    @property
    def name(self) -> str:
        return f"rank{self.rank}-{self.inner.name}"

    @property
    def in_float(self) -> LowRank | None:
        return None if self.inner.in_float is None else LowRank(self.rank, self.inner.in_float)

    def side(self, side: Side) -> Format:
        """The format of a factor. Groups of U that do not divide the rank are as long as both allow."""
        size = self.inner.group_size
        if side == "v" or size is None or self.rank % size == 0:
            return self.inner
        assert isinstance(self.inner, Integer | Codebook)
        common = math.gcd(size, self.rank)
        if common < SMALLEST_GROUP:
            raise ShapeMismatch(
                f"{self.inner.name} does not divide factors of rank {self.rank}",
                hint="ranks that are multiples of 32; or group_size: channel",
            )
        return replace(self.inner, group_size=common)

    def shape(self, side: Side, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of a factor of a weight of this shape."""
        return (shape[0], self.rank) if side == "u" else (self.rank, shape[1])

    def parameters(self, shape: tuple[int, ...]) -> int:
        return self.rank * sum(shape)

    def stored(self, shape: tuple[int, ...]) -> Stored:
        return {
            local_name(side, local): what
            for side in SIDES
            for local, what in self.side(side).stored(self.shape(side, shape)).items()
        }

    def tensors(self, side: Side, tensors: Tensors) -> dict[str, Tensor]:
        """Stored tensors of one factor, named as its own format names them."""
        start = f"weight_{side}"
        return {"weight" + name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """U [out, rank] and V [rank, in] in float32. Raises KernelError on bad tensors."""
        u, v = (self.side(side).unpack(self.tensors(side, tensors)) for side in SIDES)
        return u, v

    def join(self, u: Tensors, v: Tensors) -> dict[str, Tensor]:
        """Stored tensors of the weight, of those of its factors."""
        given: dict[Side, Tensors] = {"u": u, "v": v}
        return {local_name(side, local): tensor for side in SIDES for local, tensor in given[side].items()}

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> Tensor:
        u = self.side("u").unpack(self.tensors("u", tensors), rows)
        return u @ self.side("v").unpack(self.tensors("v", tensors))

    def read(self, shape: tuple[int, ...], start: int, stop: int, read: Read) -> Tensor:
        def reader(side: Side) -> Read:
            return lambda local, rows: read(local_name(side, local), rows)

        u = self.side("u").read(self.shape("u", shape), start, stop, reader("u"))
        return u @ self.side("v").read(self.shape("v", shape), 0, self.rank, reader("v"))

    def holding(self, inner: Format) -> LowRank:
        return LowRank(self.rank, inner)


SIDES: tuple[Side, Side] = ("u", "v")


def local_name(side: Side, local: str) -> str:
    """What a stored tensor of a factor is called: `weight_u`, `weight_v_packed`, ..."""
    return f"weight_{side}{local.removeprefix('weight')}"


def worthwhile_rank(shape: tuple[int, ...]) -> int:
    """The first rank at which factors of a matrix of this shape are no smaller than the matrix."""
    out, columns = shape
    return -(-out * columns // (out + columns))


def dense_factors(form: LowRank, u: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Stored tensors of factors in float: `form` holds a dense dtype."""
    assert isinstance(form.inner, Dense)
    dtype: torch.dtype = form.inner.dtype
    return form.join({"weight": u.to(dtype).contiguous()}, {"weight": v.to(dtype).contiguous()})
