"""Layers that multiply by a weight as it is stored: packed integers or bfloat16, activations and results in float32.

They take the places of `nn.Linear` and `nn.Embedding` in a decoder. Knows kernels by name; knows no file and no model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import KernelError
from ..kernels import dispatch
from .base import Tensors
from .integer import Integer


class PackedLinear(nn.Module):
    """x [..., in] times the transpose of an integer weight [out, in] that stays packed."""

    packed: Tensor
    """int32 [out, words], as `weight_packed` is stored."""
    scale: Tensor
    """float32 [out, groups]."""
    zero: Tensor | None
    """int8 [out, groups], or None if symmetric."""
    bias: Tensor | None
    """float32 [out], or None."""

    def __init__(self, form: Integer, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__()
        out, columns = _checked_shape(form, tensors)
        zero = None
        if not form.symmetric:
            words = tensors["weight_zero_point"].T.contiguous()
            zero = dispatch.unpack_codes(words, form.bits, out).T.contiguous()
        self.bits, self.in_features, self.out_features = form.bits, columns, out
        self.group_size = columns if form.group_size is None else form.group_size
        self.register_buffer("packed", tensors["weight_packed"].contiguous())
        self.register_buffer("scale", tensors["weight_scale"].float().contiguous())
        self.register_buffer("zero", zero)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in] to float32 [..., out]."""
        flat = x.reshape(-1, self.in_features).contiguous()
        y = dispatch.linear_packed(flat, self.packed, self.scale, self.zero, self.bits, self.group_size)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class DenseLinear(nn.Module):
    """x [..., in] times the transpose of a bfloat16 weight [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in] to float32 [..., out]."""
        y = dispatch.linear_dense(x.reshape(-1, x.shape[-1]).contiguous(), self.weight)
        y = y.view(*x.shape[:-1], self.weight.shape[0])
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """Rows of a packed weight, dequantized as they are looked up; a tied head is the same PackedLinear."""

    def __init__(self, table: PackedLinear) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to float32 [..., columns]."""
        table, flat = self.table, tokens.reshape(-1)
        zero = None if table.zero is None else table.zero[flat]
        rows = dispatch.dequantize(table.packed[flat], table.scale[flat], zero, table.bits, table.group_size)
        return rows.view(*tokens.shape, table.in_features)


class DenseEmbedding(nn.Module):
    """Rows of a bfloat16 weight [vocab_size, hidden_size], in float32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to float32 [..., hidden_size]."""
        return F.embedding(tokens, self.weight).float()


def _checked_shape(form: Integer, tensors: Tensors) -> tuple[int, int]:
    """Shape [out, in] of a packed weight, after every stored tensor was found to be as the format says."""
    out, columns = (int(n) for n in tensors["weight_shape"])
    for name, (dtype, shape) in form.stored((out, columns)).items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != shape:
            arrived = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise KernelError(f"{form.name}: {name} is {arrived}, expected {dtype} {shape}")
    return out, columns
