"""Exact cuts of a stored weight: rows and columns of its codes, scales, zero points and outliers, nothing rounded.

Columns are cut at whole groups. Knows the stored tensors of every format that a layer multiplies by; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import EngineError
from ..kernels import dispatch
from .base import ROW_STEP, SHAPE, Format, Tensors
from .codebook import Codebook
from .codes import Outliers
from .dense import Dense
from .integer import Integer
from .kmeans import KMeans
from .outliers import OUTLIERS, POINTERS, Read, pack_outliers, read_outliers, unpack_outliers

Spans: TypeAlias = tuple[tuple[int, int], ...]
"""Ranges (first, one past the last), one after another; they may repeat and overlap."""


def cut_unit(form: Format, module: str) -> int:
    """Columns that a cut must keep together. Raises EngineError for a format that cannot be cut."""
    if isinstance(form, Integer | Codebook | KMeans | Dense):
        return form.group_size or 1
    raise EngineError(
        f"{module} is stored as {form.name}, which cannot be cut",
        hint="run it without --tp (--pp is possible), or compress the model to another format",
    )


def read_rows(form: Format, shape: Sequence[int], start: int, stop: int, read: Read) -> tuple[dict[str, Tensor], int]:
    """Stored tensors of a slab of rows that holds start..stop, little larger, and the slab's first row."""
    first = start // ROW_STEP * ROW_STEP
    before, upto = form.stored((first, *shape[1:])), form.stored((stop, *shape[1:]))
    tensors: dict[str, Tensor] = {}
    for local, (_, stored_shape) in form.stored(tuple(shape)).items():
        if local == SHAPE:
            tensors[local] = torch.tensor([stop - first, *shape[1:]])
        elif local in form.uncut:
            tensors[local] = read(local, slice(0, stored_shape[0]))
        elif local not in OUTLIERS:
            tensors[local] = read(local, slice(before[local][1][0], upto[local][1][0]))
    if POINTERS in before:
        tensors |= read_outliers(read, first, stop)
    return tensors, first


def cut(
    form: Format, tensors: Tensors, shape: tuple[int, int], rows: Spans | None, columns: Spans | None
) -> dict[str, Tensor]:
    """Stored tensors of these rows and columns (None: all) of a weight of this shape."""
    rows, columns = rows or ((0, shape[0]),), columns or ((0, shape[1]),)
    size = (_length(rows), _length(columns))
    whole = columns == ((0, shape[1]),)
    found: dict[str, Tensor] = {}
    for local, tensor in tensors.items():
        if local == SHAPE:
            found[local] = torch.tensor(size)
        elif local in form.uncut:
            found[local] = tensor
        elif local == "weight_zero_point":
            assert isinstance(form, Integer)
            zero = dispatch.unpack_codes(tensor.T.contiguous(), form.bits, shape[0]).T
            zero = _groups(form, _take(zero, rows, 0), columns)
            found[local] = dispatch.pack_codes(zero.T.contiguous(), form.bits).T.contiguous()
        elif local not in OUTLIERS:
            taken = _take(tensor, rows, 0)
            found[local] = (taken if whole else _columns(form, local, taken, shape[1], columns)).contiguous()
    if POINTERS in tensors:
        found |= pack_outliers(_outliers(unpack_outliers(tensors, shape), rows, columns), size)
    return found


def _columns(form: Format, local: str, tensor: Tensor, width: int, columns: Spans) -> Tensor:
    """Columns of one stored tensor, whose rows are cut already."""
    if local == "weight_scale":
        return _groups(form, tensor, columns)
    if local == "weight_levels":
        return tensor
    if local == "weight":
        return _take(tensor, columns, 1)
    assert isinstance(form, Integer | Codebook | KMeans)
    if tensor.dtype == torch.uint8:  # two codes a byte
        return _take(tensor, tuple((start // 2, stop // 2) for start, stop in columns), 1)
    codes = dispatch.unpack_codes(tensor.contiguous(), form.bits, width)
    return dispatch.pack_codes(_take(codes, columns, 1).contiguous(), form.bits)


def _groups(form: Format, tensor: Tensor, columns: Spans) -> Tensor:
    """What belongs to the groups of these columns: [rows, groups]."""
    size = form.group_size
    if size is None:
        return tensor
    return _take(tensor, tuple((start // size, stop // size) for start, stop in columns), 1)


def _take(tensor: Tensor, spans: Spans, axis: int) -> Tensor:
    parts = [tensor.narrow(axis, start, stop - start) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _outliers(outliers: Outliers, rows: Spans, columns: Spans) -> Outliers:
    """Those in these rows and columns, counted from there; the columns are ranges that rise."""
    parts, at = [], 0
    for start, stop in rows:
        own = outliers.between(start, stop)
        place = torch.full_like(own.columns, -1)
        first = 0
        for left, right in columns:
            inside = (own.columns >= left) & (own.columns < right)
            place[inside] = own.columns[inside] - left + first
            first += right - left
        kept = place >= 0
        parts.append((own.rows[kept] + at, place[kept], own.values[kept]))
        at += stop - start
    return Outliers(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)
