"""Weights kept beside a packed matrix [out, in], stored as compressed sparse rows (CSR).

outlier_pointers  int32 [out + 1]    row r has the entries pointers[r] .. pointers[r + 1] of the other two
outlier_columns   int16 [n]          rising within a row; int32 where a row is longer than 32768
outlier_values    bf16  [n]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import KernelError
from .codes import Outliers

POINTERS, COLUMNS, VALUES = OUTLIERS = ("outlier_pointers", "outlier_columns", "outlier_values")
Read: TypeAlias = Callable[[str, slice], Tensor]
"""Local tensor name and rows of that tensor -> those rows."""


def stored_outliers(n: int, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Local name, dtype and shape of what stores n outliers of a weight [out, in]."""
    out, columns = shape
    return {
        POINTERS: (torch.int32, (out + 1,)),
        COLUMNS: (torch.int16 if columns <= 1 << 15 else torch.int32, (n,)),
        VALUES: (torch.bfloat16, (n,)),
    }


def pack_outliers(outliers: Outliers | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Stored tensors of these outliers (None: no outliers) of a weight of this shape."""
    if outliers is None:
        none = torch.zeros(0, dtype=torch.int32)
        outliers = Outliers(none, none, none.float())
    column_dtype = stored_outliers(0, shape)[COLUMNS][0]
    pointers = torch.zeros(shape[0] + 1, dtype=torch.int32)
    pointers[1:] = torch.bincount(outliers.rows.long(), minlength=shape[0]).cumsum(0)
    return {
        POINTERS: pointers,
        COLUMNS: outliers.columns.to(column_dtype).contiguous(),
        VALUES: outliers.values.to(torch.bfloat16).contiguous(),
    }


def unpack_outliers(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Outliers:
    """The outliers of a weight of this shape. Raises KernelError on tensors that make no sense, whoever wrote them."""
    missing = [name for name in OUTLIERS if name not in tensors]
    if missing:
        raise KernelError(f"{missing[0]} is missing")
    pointers, columns, values = (tensors[name] for name in OUTLIERS)
    counts = pointers.diff()
    fits = (
        tuple(pointers.shape) == (shape[0] + 1,)
        and columns.shape == values.shape
        and int(pointers[0]) == 0
        and int(pointers[-1]) == len(columns)
        and not bool((counts < 0).any())
    )
    if not fits:
        raise KernelError(
            f"{POINTERS} {list(pointers.shape)} do not share out {len(columns)} columns and {len(values)} values among "
            f"{shape[0]} rows"
        )
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < shape[1]:
        raise KernelError(f"{COLUMNS} from {columns.min()} to {columns.max()} are not of a weight {list(shape)}")
    rows = torch.repeat_interleave(torch.arange(shape[0], dtype=torch.int32), counts)
    return Outliers(rows, columns.int(), values.float())


def read_outliers(read: Read, start: int, stop: int) -> dict[str, Tensor]:
    """The stored tensors of rows start..stop alone. Raises KernelError if a pointer is out of place."""
    pointers = read(POINTERS, slice(start, stop + 1))
    first, last = int(pointers[0]), int(pointers[-1])
    if not 0 <= first <= last:
        raise KernelError(f"{POINTERS} go from {first} to {last} between rows {start} and {stop}")
    entries = slice(first, last)
    return {POINTERS: pointers - first, COLUMNS: read(COLUMNS, entries), VALUES: read(VALUES, entries)}
