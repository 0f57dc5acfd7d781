"""Layers that multiply by a weight as it is stored: packed integers, indices into levels, factors, trains, bfloat16.

They take the places of `nn.Linear` and `nn.Embedding` in a decoder. Knows kernels by name; knows no file and no model.
"""

from __future__ import annotations

import abc
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import dispatch
from .base import SHAPE, Format, Tensors, check_tensors
from .codebook import Codebook
from .codes import Outliers
from .dense import Dense
from .integer import Integer
from .kmeans import KMeans
from .low_rank import LowRank
from .outliers import COLUMNS, POINTERS, VALUES, pack_outliers, unpack_outliers
from .sparse import Sparse
from .tensor_train import TensorTrain

ROWS_AT_ONCE = 4096
"""Rows of a tensor train that are made at a time where all are multiplied."""


def stored_linear(form: Format, tensors: Tensors, bias: Tensor | None = None) -> Table:
    """The layer that multiplies by a weight of this format, which is not dense. Raises KernelError on bad tensors."""
    if isinstance(form, Integer):
        return PackedLinear(form, tensors, bias)
    if isinstance(form, LowRank):
        return FactoredLinear(form, tensors, bias)
    if isinstance(form, Sparse):
        return SparseLinear(form, tensors, bias)
    if isinstance(form, TensorTrain):
        return TrainLinear(form, tensors, bias)
    assert isinstance(form, Codebook | KMeans)
    return TableLinear(form, tensors, bias)


class Table(nn.Module, abc.ABC):
    """x [..., in] times the transpose of a weight [out, in] whose rows can be looked up as well."""

    in_features: int
    out_features: int

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in] to float32 [..., out]."""

    @abc.abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """float32 [count, in]: these rows, int64 [count], of the weight."""


class StoredLinear(Table):
    """x [..., in] times the transpose of a weight [out, in] that stays packed, plus its outliers and its bias."""

    bias: Tensor | None
    """float32 [out], or None."""
    outlier_pointers: Tensor | None
    """int32 [out + 1], or None if no weight is kept beside the packed ones; then the other two are None, too."""
    outlier_columns: Tensor | None
    """int16 or int32 [n]"""
    outlier_values: Tensor | None
    """bfloat16 [n]"""

    def _hold(self, outliers: Outliers | None, bias: Tensor | None) -> None:
        found = {} if outliers is None else pack_outliers(outliers, (self.out_features, self.in_features))
        for name in (POINTERS, COLUMNS, VALUES):
            self.register_buffer(name, found.get(name))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).contiguous()
        y = self._multiply(flat)
        if self.outlier_pointers is not None:
            assert self.outlier_columns is not None
            assert self.outlier_values is not None
            y = y + dispatch.linear_sparse(flat, self.outlier_pointers, self.outlier_columns, self.outlier_values)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def rows(self, index: Tensor) -> Tensor:
        found = self._rows(index)
        if self.outlier_pointers is not None:
            assert self.outlier_columns is not None
            assert self.outlier_values is not None
            first = self.outlier_pointers[index].long()
            counts = self.outlier_pointers[index + 1].long() - first
            row = torch.repeat_interleave(torch.arange(len(index)), counts)
            entry = torch.arange(len(row)) + (first - counts.cumsum(0) + counts)[row]
            places = (row, self.outlier_columns[entry].long())
            found.index_put_(places, self.outlier_values[entry].float(), accumulate=True)
        return found

    @abc.abstractmethod
    def _multiply(self, x: Tensor) -> Tensor:
        """float32 [tokens, in] to float32 [tokens, out], by the packed weight alone."""

    @abc.abstractmethod
    def _rows(self, index: Tensor) -> Tensor:
        """float32 [count, in]: these rows of the packed weight alone."""


class PackedLinear(StoredLinear):
    """Multiplies by integers."""

    packed: Tensor
    """int32 [out, words], as `weight_packed` is stored."""
    scale: Tensor
    """float32 [out, groups]."""
    zero: Tensor | None
    """int8 [out, groups], or None if symmetric."""

    def __init__(self, form: Integer, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__()
        out, columns = (int(n) for n in tensors[SHAPE])
        check_tensors(form, tensors, (out, columns))
        zero = None
        if not form.symmetric:
            words = tensors["weight_zero_point"].T.contiguous()
            zero = dispatch.unpack_codes(words, form.bits, out).T.contiguous()
        self.bits, self.in_features, self.out_features = form.bits, columns, out
        self.group_size = columns if form.group_size is None else form.group_size
        self.register_buffer("packed", tensors["weight_packed"].contiguous())
        self.register_buffer("scale", tensors["weight_scale"].float().contiguous())
        self.register_buffer("zero", zero)
        self._hold(unpack_outliers(tensors, (out, columns)) if form.outliers else None, bias)

    def _multiply(self, x: Tensor) -> Tensor:
        return dispatch.linear_packed(x, self.packed, self.scale, self.zero, self.bits, self.group_size)

    def _rows(self, index: Tensor) -> Tensor:
        zero = None if self.zero is None else self.zero[index]
        return dispatch.dequantize(self.packed[index], self.scale[index], zero, self.bits, self.group_size)


class TableLinear(StoredLinear):
    """Multiplies by what indices into levels stand for."""

    packed: Tensor
    """int32 [out, words]: indices as dense little-endian bits."""
    levels: Tensor
    """float32 [2^bits] of all rows, or [out, 2^bits]."""
    scale: Tensor
    """float32 [out, groups]."""

    def __init__(self, form: Codebook | KMeans, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__()
        codes = form.codes(tensors)
        assert codes.levels is not None
        self.bits, (self.out_features, self.in_features) = form.bits, codes.codes.shape
        signed = (codes.codes.short() - (1 << form.bits - 1)).to(torch.int8)  # packing adds the half again
        self.register_buffer("packed", dispatch.pack_codes(signed, form.bits))
        self.register_buffer("levels", codes.levels)
        self.register_buffer("scale", codes.scale.contiguous())
        self._hold(codes.outliers, bias)

    def _multiply(self, x: Tensor) -> Tensor:
        return dispatch.linear_table(x, self.packed, self.levels, self.scale, self.bits)

    def _rows(self, index: Tensor) -> Tensor:
        levels = self.levels if self.levels.ndim == 1 else self.levels[index]
        return dispatch.look_up(self.packed[index], levels, self.scale[index], self.bits, self.in_features)


class SparseLinear(StoredLinear):
    """Multiplies by a weight without its zeros, which is filled up for each product."""

    def __init__(self, form: Sparse, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = form.unpack(tensors).shape  # and so all tensors are checked
        self.form, self.locals = form, tuple(tensors)
        for local, tensor in tensors.items():
            self.register_buffer(local, tensor.contiguous())
        self._hold(None, bias)

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.form.unpack(self._stored()))

    def _rows(self, index: Tensor) -> Tensor:
        return self.form.unpack(self._stored())[index]

    def _stored(self) -> dict[str, Tensor]:
        return {local: self.get_buffer(local) for local in self.locals}


class DenseLinear(Table):
    """x [..., in] times the transpose of a bfloat16 weight [out, in]; one of another dtype is held in float32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        held = weight if weight.dtype is torch.bfloat16 else weight.float()
        self.register_buffer("weight", held.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype is torch.float32:
            return F.linear(x, self.weight, self.bias)
        y = dispatch.linear_dense(x.reshape(-1, x.shape[-1]).contiguous(), self.weight)
        y = y.view(*x.shape[:-1], self.weight.shape[0])
        return y if self.bias is None else y + self.bias

    def rows(self, index: Tensor) -> Tensor:
        return self.weight[index].float()


class FactoredLinear(Table):
    """Multiplies by V [rank, in], then by U [out, rank]."""

    def __init__(self, form: LowRank, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__()
        self.v = _factor(form.side("v"), form.tensors("v", tensors), None)
        self.u = _factor(form.side("u"), form.tensors("u", tensors), bias)
        self.in_features, self.out_features = self.v.in_features, self.u.out_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.u(self.v(x))
        return y

    def rows(self, index: Tensor) -> Tensor:
        return self.u.rows(index) @ self.v.rows(torch.arange(self.v.out_features))


def _factor(form: Format, tensors: Tensors, bias: Tensor | None) -> Table:
    return DenseLinear(tensors["weight"], bias) if isinstance(form, Dense) else stored_linear(form, tensors, bias)


class TrainLinear(Table):
    """Multiplies by rows that are made of their cores, a few thousand at a time."""

    bias: Tensor | None

    def __init__(self, form: TensorTrain, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__()
        self.form = form
        self.out_features, self.in_features = len(tensors["weight_core_0"]), math.prod(form.modes)
        check_tensors(form, tensors, (self.out_features, self.in_features))
        for k in range(len(form.modes)):
            self.register_buffer(f"core_{k}", tensors[f"weight_core_{k}"].contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(self.out_features)
        y = torch.cat([F.linear(x, self.rows(part)) for part in torch.split(index, ROWS_AT_ONCE)], dim=-1)
        return y if self.bias is None else y + self.bias

    def rows(self, index: Tensor) -> Tensor:
        return self.form.rows([self.get_buffer(f"core_{k}")[index] for k in range(len(self.form.modes))])


class PackedEmbedding(nn.Module):
    """Rows of a packed weight, dequantized as they are looked up; a tied head is the same layer."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to float32 [..., columns]."""
        return self.table.rows(tokens.reshape(-1)).view(*tokens.shape, self.table.in_features)


class DenseEmbedding(nn.Module):
    """Rows of a bfloat16 weight [vocab_size, hidden_size], in float32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to float32 [..., hidden_size]."""
        return F.embedding(tokens, self.weight).float()
