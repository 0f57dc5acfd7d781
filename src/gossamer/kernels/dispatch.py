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
