"""Chooses the kernel for torch tensors on the CPU.

Few tokens: the C++ product straight from the stored weight, which reads the weight once. Many tokens: dequantize in
C++, then torch's matrix product, which reuses each weight more often. GOSSAMER_KERNELS=reference computes everything
in plain torch instead (the oracle, slow). A missing extension is an error, never a silent slow path.
Every function raises KernelError for shapes, dtypes or layouts that do not fit (the oracle checks nothing).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import settings
from ..errors import KernelError, did_you_mean
from . import cpu, reference

FEW_TOKENS = 32
"""Up to so many tokens the C++ products are quicker. Measured (benchmarks/micro_linear.py): 32 to 64 with AVX-512 and
16 to 48 with AVX2, the larger numbers for the larger weights."""

SPARSE_AT_ONCE = 1 << 24
"""Products with weights in sparse rows that are made at a time: bounds their memory."""


def isa() -> str:
    """The instruction set of the kernels in use: portable, avx2, avx512; or reference."""
    return "reference" if _reference() else cpu.isa()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes int8 [rows, columns] from packed int32 [rows, words], for 1 to 8 bits."""
    if _reference():
        return reference.unpack_codes(packed, bits, columns)
    return torch.from_numpy(cpu.unpack_codes(_array("packed", packed), bits, columns))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed int32 [rows, words] from codes int8 [rows, columns], for 1 to 8 bits."""
    if _reference():
        return reference.pack_codes(codes, bits)
    return torch.from_numpy(cpu.pack_codes(_array("codes", codes), bits))


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """float32 [out, in] = (codes - zero) * scale; packed [out, words], scale and zero [out, in / group_size]."""
    if _reference():
        return reference.dequantize(packed, scale, zero, bits, group_size)
    weight = _weight(packed, scale, zero)
    return torch.from_numpy(cpu.dequantize(*weight, bits, group_size, settings.threads()))


def linear_packed(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """float32 [tokens, out] = x float32 [tokens, in] times the transpose of (codes - zero) * scale [out, in].

    packed int32 [out, words], scale float32 and zero int8 (or None) [out, in / group_size]; 2 to 8 bits.
    """
    if _reference():
        return reference.linear_packed(x, packed, scale, zero, bits, group_size)
    if x.ndim != 2 or len(x) <= FEW_TOKENS:
        weight = _weight(packed, scale, zero)
        y = cpu.packed_linear(_array("x", x), *weight, bits, group_size, settings.threads())
        return torch.from_numpy(y)
    return _product(x, dequantize(packed, scale, zero, bits, group_size))


def linear_dense(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [tokens, out] = x float32 [tokens, in] times the transpose of a weight [out, in] of any float dtype."""
    if _reference():
        return reference.linear_dense(x, weight)
    if weight.dtype == torch.bfloat16 and (x.ndim != 2 or len(x) <= FEW_TOKENS):
        bits = _array("weight", weight.view(torch.int16)).view(np.uint16)
        return torch.from_numpy(cpu.dense_linear_bf16(_array("x", x), bits, settings.threads()))
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise KernelError(f"linear_dense: weight is {weight.dtype} {list(weight.shape)}, expected floats [out, in]")
    return _product(x, weight.float())


def look_up(packed: Tensor, levels: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """float32 [out, in] = levels[code] * scale; packed int32 [out, words], scale float32 [out, groups].

    levels float32 [2^bits] of all rows, or [out, 2^bits] of each; a code is stored as it is, from 0; 1 to 8 bits.
    """
    _check_table(packed, levels, scale, bits, columns)
    if _reference():
        return reference.look_up(packed, levels, scale, bits, columns)
    out, groups = scale.shape
    index = torch.from_numpy(cpu.unpack_codes(_array("packed", packed), bits, columns)).int().add_(1 << bits - 1)
    if levels.ndim == 2:
        index += torch.arange(out, dtype=torch.int32).unsqueeze(1) * levels.shape[1]
    values = levels.flatten().index_select(0, index.flatten()).view(out, groups, columns // groups)
    return values.mul_(scale.unsqueeze(-1)).view(out, columns)


def linear_table(x: Tensor, packed: Tensor, levels: Tensor, scale: Tensor, bits: int) -> Tensor:
    """float32 [tokens, out] = x float32 [tokens, in] times the transpose of levels[code] * scale [out, in].

    The weight is as for look_up, and is made float whatever the number of tokens: no kernel multiplies by it directly.
    """
    if x.ndim != 2:
        raise KernelError(f"x is {x.dtype} {list(x.shape)}, expected torch.float32 [any, any]")
    if _reference():
        _check_table(packed, levels, scale, bits, x.shape[1])
        return reference.linear_table(x, packed, levels, scale, bits)
    return _product(x, look_up(packed, levels, scale, bits, x.shape[1]))


def linear_sparse(x: Tensor, pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """float32 [tokens, out] = x float32 [tokens, in] times the transpose of a weight in compressed sparse rows.

    pointers int32 [out + 1]; columns and values [n]. In torch, a few tokens at a time.
    """
    if x.ndim != 2 or pointers.ndim != 1 or columns.shape != values.shape or int(pointers[-1]) != len(columns):
        shapes = ", ".join(str(list(t.shape)) for t in (x, pointers, columns, values))
        raise KernelError(f"x, pointers, columns and values are {shapes}: no sparse weight to multiply by")
    step = max(1, SPARSE_AT_ONCE // max(1, len(values)))
    return torch.cat([reference.linear_sparse(part, pointers, columns, values) for part in torch.split(x, step)])


def _check_table(packed: Tensor, levels: Tensor, scale: Tensor, bits: int, columns: int) -> None:
    """Refuse tensors that do not describe one weight [out, columns]."""
    out = len(packed)
    fits = (
        1 <= bits <= 8
        and packed.dtype == torch.int32
        and tuple(packed.shape) == (out, cpu.words(columns, bits))
        and tuple(levels.shape) in ((2**bits,), (out, 2**bits))
        and scale.ndim == 2
        and len(scale) == out
        and scale.shape[1] > 0
        and columns % scale.shape[1] == 0
        and levels.dtype == scale.dtype == torch.float32
    )
    if not fits:
        tensors = zip(("packed", "levels", "scale"), (packed, levels, scale), strict=True)
        found = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in tensors)
        raise KernelError(f"{found} are no weight of {columns} columns in codes of {bits} bits")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, in] times the transpose of a float32 weight [out, in], in torch."""
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise KernelError(f"x is {x.dtype} {list(x.shape)}, expected torch.float32 [any, {weight.shape[1]}]")
    return x @ weight.T


def _weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int8] | None]:
    return _array("packed", packed), _array("scale", scale), None if zero is None else _array("zero", zero)


def _array(name: str, tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as a numpy array."""
    if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16 or tensor.is_sparse:
        raise KernelError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, which no CPU kernel takes there"
        )
    return tensor.detach().numpy()


def _reference() -> bool:
    """True if GOSSAMER_KERNELS asks for the oracle."""
    wanted = os.environ.get("GOSSAMER_KERNELS", "cpu")
    if wanted not in {"cpu", "reference"}:
        raise KernelError(
            f"GOSSAMER_KERNELS={wanted!r} names no kernels", hint=did_you_mean(wanted, ["cpu", "reference"])
        )
    return wanted == "reference"
