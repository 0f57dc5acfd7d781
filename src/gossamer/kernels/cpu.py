"""The C++ kernels on numpy arrays, with their arguments checked. Knows no torch.

Every function raises KernelError that says which argument arrived with what shape, dtype or layout. Arrays are
C-contiguous and never copied. The instruction set is the fastest that the machine has; GOSSAMER_ISA=portable, avx2 or
avx512 forces one.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import KernelError, did_you_mean

Floats: TypeAlias = NDArray[np.float32]
Zeros: TypeAlias = NDArray[np.int8] | None


@functools.cache
def extension() -> ModuleType:
    """The compiled module, with the instruction set that GOSSAMER_ISA asks for. Raises KernelError if there is none."""
    try:
        from . import _cpu
    except ImportError as error:
        raise KernelError(
            f"the C++ kernels (gossamer.kernels._cpu) cannot be loaded: {error}",
            hint="build them with `make build`, or set GOSSAMER_KERNELS=reference to compute in torch, slowly",
        ) from error
    wanted = os.environ.get("GOSSAMER_ISA")
    if wanted:
        _choose(_cpu, wanted)
    return _cpu


def isas() -> tuple[str, ...]:
    """Instruction sets that the kernels have for this machine, slowest first."""
    return tuple(extension().isas())


def isa() -> str:
    """The instruction set in use."""
    return str(extension().isa())


def use_isa(name: str) -> None:
    """Use another instruction set from now on, in every thread. Raises KernelError if this machine has none such."""
    _choose(extension(), name)


def _choose(module: ModuleType, name: str) -> None:
    if name not in module.isas():
        raise KernelError(f"no kernels for {name!r} on this machine", hint=did_you_mean(name, module.isas()))
    module.use_isa(name)


def words(columns: int, bits: int) -> int:
    """int32 words that hold one row of `columns` codes."""
    return (columns * bits + 31) // 32


def unpack_codes(packed: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """Codes int8 [rows, columns] from packed [rows, words(columns, bits)]; element i starts at bit i * bits."""
    _require_int("unpack_codes", "bits", bits, 1, 8)
    _require_int("unpack_codes", "columns", columns, 0)
    _require("unpack_codes", "packed", packed, np.int32, (None, words(columns, bits)))
    codes = np.empty((packed.shape[0], columns), np.int8)
    extension().unpack_codes(packed, codes, bits)
    return codes


def pack_codes(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Packed int32 [rows, words(columns, bits)] from codes [rows, columns] in the range of so many bits."""
    _require_int("pack_codes", "bits", bits, 1, 8)
    _require("pack_codes", "codes", codes, np.int8, (None, None))
    half = 1 << (bits - 1)
    if codes.size and not (-half <= int(codes.min()) and int(codes.max()) < half):
        raise KernelError(f"pack_codes: codes from {codes.min()} to {codes.max()} do not fit in {bits} bits")
    packed = np.empty((codes.shape[0], words(codes.shape[1], bits)), np.int32)
    extension().pack_codes(codes, packed, bits)
    return packed


def packed_linear(
    x: Floats, packed: NDArray[np.int32], scale: Floats, zero: Zeros, bits: int, group_size: int, threads: int
) -> Floats:
    """y [tokens, out] = x [tokens, in] times the transpose of ((codes - zero) * scale) [out, in].

    packed [out, words(in, bits)], scale [out, in / group_size], zero int8 of scale's shape or None; bits 2 to 8.
    Accumulates in float32 straight from the codes, so the weight is read once, packed. Meant for few tokens.
    Groups that are no multiple of 16 columns (32 at 4 bits) are right too, but several times slower.
    """
    _require("packed_linear", "x", x, np.float32, (None, None))
    _require_weight("packed_linear", packed, scale, zero, bits, group_size, x.shape[1])
    _require_int("packed_linear", "threads", threads, 1, 1024)
    y = np.empty((x.shape[0], packed.shape[0]), np.float32)
    if y.size:
        extension().packed_linear(x, packed, scale, zero, bits, threads, y)
    return y


def dequantize(
    packed: NDArray[np.int32], scale: Floats, zero: Zeros, bits: int, group_size: int, threads: int
) -> Floats:
    """The float32 weight [out, in] = (codes - zero) * scale, exactly; arguments as for packed_linear."""
    _require("dequantize", "scale", scale, np.float32, (None, None))
    _require_int("dequantize", "group_size", group_size, 1)
    columns = scale.shape[1] * group_size
    _require_weight("dequantize", packed, scale, zero, bits, group_size, columns)
    _require_int("dequantize", "threads", threads, 1, 1024)
    out = np.empty((packed.shape[0], columns), np.float32)
    if out.size:
        extension().dequantize(packed, scale, zero, bits, threads, out)
    return out


def dense_linear_bf16(x: Floats, weight: NDArray[np.uint16], threads: int) -> Floats:
    """y [tokens, out] = x [tokens, in] times the transpose of a bfloat16 weight [out, in], given as its bits (uint16).

    Accumulates in float32 and reads the weight once for each four tokens.
    """
    _require("dense_linear_bf16", "x", x, np.float32, (None, None))
    _require("dense_linear_bf16", "weight", weight, np.uint16, (None, x.shape[1]))
    _require_int("dense_linear_bf16", "threads", threads, 1, 1024)
    if x.shape[1] == 0:
        raise KernelError(f"dense_linear_bf16: weight {list(weight.shape)} has no columns")
    y = np.empty((x.shape[0], weight.shape[0]), np.float32)
    if y.size:
        extension().dense_linear_bf16(x, weight, threads, y)
    return y


def read_bytes(data: NDArray[np.uint8], threads: int) -> None:
    """Read an array [bytes] once and do nothing with it: what a benchmark times to learn the read bandwidth."""
    _require("read_bytes", "data", data, np.uint8, (None,))
    _require_int("read_bytes", "threads", threads, 1, 1024)
    extension().read_bytes(data, threads)


def _require_weight(kernel: str, packed: Any, scale: Any, zero: Any, bits: Any, group_size: Any, columns: int) -> None:
    """Refuse packed tensors that do not describe one weight [out, columns]."""
    _require_int(kernel, "bits", bits, 2, 8)
    _require_int(kernel, "group_size", group_size, 1)
    if columns == 0 or columns % group_size:
        raise KernelError(f"{kernel}: group_size {group_size} does not divide {columns} columns")
    _require(kernel, "packed", packed, np.int32, (None, words(columns, bits)))
    groups = (packed.shape[0], columns // group_size)
    _require(kernel, "scale", scale, np.float32, groups)
    if zero is not None:
        _require(kernel, "zero", zero, np.int8, groups)


def _require_int(kernel: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"an integer from {low}" + ("" if high is None else f" to {high}")
        raise KernelError(f"{kernel}: {name} is {value!r}, expected {wanted}")


def _require(kernel: str, name: str, array: Any, dtype: type, shape: tuple[int | None, ...]) -> None:
    """Refuse anything but a C-contiguous array of this dtype and shape (None: any length)."""
    if not isinstance(array, np.ndarray):
        raise KernelError(f"{kernel}: {name} is a {type(array).__name__}, expected a numpy array")
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise KernelError(
            f"{kernel}: {name} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} [{wanted}]"
        )
    if not array.flags.c_contiguous:
        raise KernelError(f"{kernel}: {name} {list(array.shape)} has strides {array.strides}, expected C-contiguous")
