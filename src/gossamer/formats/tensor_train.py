"""Rows as tensor trains: each token's embedding is a tensor of its own, kept as small cores (TensorGPT, 2307.00526).

A row [columns] is folded to a tensor [modes...], whose entry (i_1, ..., i_n) is the product G_1[i_1] ... G_n[i_n] of
matrices [ranks[k-1], ranks[k]], both ends of which are 1. The stored tensors of a weight [out, columns]:
    weight_core_k  float [out, ranks[k-1] * modes[k] * ranks[k]]   core k of every row
so that a row is looked up by reading its cores alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ShapeMismatch
from .base import Format, Stored, Tensors, check_tensors
from .dense import FLOAT_NAMES

ROWS_AT_ONCE = 4096
"""Rows that are taken apart at a time: what bounds the memory beside the result."""


@dataclass(frozen=True)
class TensorTrain(Format):
    """Every row as a train of cores over `modes`, joined by `ranks` (one fewer)."""

    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    group_size = None

    def __post_init__(self) -> None:
        if len(self.modes) < 2 or len(self.ranks) != len(self.modes) - 1 or min(*self.modes, *self.ranks) < 1:
            raise ShapeMismatch(
                f"modes {list(self.modes)} with ranks {list(self.ranks)} are no tensor train",
                hint="two modes or more, and a rank between each and the next, such as modes [24, 24], ranks [8]",
            )
        for k, rank in enumerate(self.ranks):
            most = min(self._ends[k] * self.modes[k], math.prod(self.modes[k + 1 :]))
            if rank > most:
                raise ShapeMismatch(f"rank {rank} between modes {k} and {k + 1} of {list(self.modes)}: {most} is whole")

    @property
    def _ends(self) -> tuple[int, ...]:
        return (1, *self.ranks, 1)

    @property
    def dtype_name(self) -> str:
        """The dtype of the cores."""
        return FLOAT_NAMES[self.dtype]

    @property
    def name(self) -> str:
        modes, ranks = ("x".join(map(str, numbers)) for numbers in (self.modes, self.ranks))
        return f"tt{modes}-rank{ranks}-{self.dtype_name}"

    def parameters(self, shape: tuple[int, ...]) -> int:
        return sum(math.prod(stored) for _, stored in self.stored(shape).values())

    def stored(self, shape: tuple[int, ...]) -> Stored:
        rows, columns = shape
        if math.prod(self.modes) != columns:
            raise ShapeMismatch(
                f"modes {list(self.modes)} fold rows of {math.prod(self.modes)}, not of {columns}",
                hint=f"numbers whose product is {columns}",
            )
        sizes = [left * mode * right for mode, (left, right) in zip(self.modes, pairwise(self._ends), strict=True)]
        return {f"weight_core_{k}": (self.dtype, (rows, size)) for k, size in enumerate(sizes)}

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> Tensor:
        count = len(tensors["weight_core_0"]) if "weight_core_0" in tensors else 0
        check_tensors(self, tensors, (count, math.prod(self.modes)))
        cores = [tensors[f"weight_core_{k}"] for k in range(len(self.modes))]
        return self.rows([core if rows is None else core[rows] for core in cores])

    def rows(self, cores: list[Tensor]) -> Tensor:
        """float32 [count, columns]: what cores [count, ...] of as many rows stand for."""
        count, done = len(cores[0]), torch.ones(len(cores[0]), 1, 1)
        for core, left, right in zip(cores, self._ends, self._ends[1:], strict=False):
            done = (done @ core.float().view(count, left, -1)).view(count, -1, right)
        return done.view(count, -1)

    def decompose(self, weight: Tensor) -> dict[str, Tensor]:
        """Stored tensors of a float weight [out, columns]: TT-SVD of each row (Oseledets 2011, algorithm 1).

        The squared error of a row is at most the sum over the joints of the squared singular values that they drop.
        """
        parts = [self._cores(part) for part in torch.split(weight, ROWS_AT_ONCE)]
        return {f"weight_core_{k}": torch.cat([part[k] for part in parts]) for k in range(len(self.modes))}

    def _cores(self, weight: Tensor) -> list[Tensor]:
        count, rest, cores = len(weight), weight.double(), []
        for mode, (left, right) in zip(self.modes[:-1], pairwise(self._ends), strict=False):
            u, s, vh = torch.linalg.svd(rest.reshape(count, left * mode, -1), full_matrices=False)
            cores.append(u[:, :, :right])
            rest = s[:, :right, None] * vh[:, :right]
        return [core.reshape(count, -1).to(self.dtype) for core in (*cores, rest)]

    def holding(self, inner: Format) -> Format:
        raise ShapeMismatch(
            f"the cores of {self.name} stay in float, not {inner.name}", hint="leave `embedding` and `head` away"
        )
