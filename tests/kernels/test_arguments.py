"""What Python can pass wrongly is a KernelError that says what arrived, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gossamer.errors import KernelError
from gossamer.kernels import cpu

GOOD: dict[str, Any] = {
    "x": np.zeros((2, 64), np.float32),
    "packed": np.zeros((8, 8), np.int32),
    "scale": np.ones((8, 2), np.float32),
    "zero": np.zeros((8, 2), np.int8),
    "bits": 4,
    "group_size": 32,
    "threads": 1,
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": np.zeros((2, 64), np.float64)}, r"x is float64 \[2, 64\], expected float32"),
    ({"x": np.zeros(64, np.float32)}, r"x is float32 \[64\]"),
    ({"x": np.zeros((2, 65), np.float32)}, "group_size 32 does not divide 65 columns"),
    ({"x": np.zeros((2, 96), np.float32)}, r"packed is int32 \[8, 8\], expected int32 \[any, 12\]"),
    ({"x": np.zeros((64, 2), np.float32).T}, r"x \[2, 64\] has strides .*, expected C-contiguous"),
    ({"x": [[0.0] * 64]}, "x is a list, expected a numpy array"),
    ({"x": np.zeros((2, 0), np.float32)}, "does not divide 0 columns"),
    ({"packed": np.zeros((8, 8), np.int64)}, "packed is int64"),
    ({"packed": np.zeros((8, 9), np.int32)}, r"packed is int32 \[8, 9\]"),
    ({"packed": np.zeros((8, 16), np.int32)[:, ::2]}, "packed .* has strides"),
    ({"packed": np.zeros((7, 8), np.int32)}, r"scale is float32 \[8, 2\], expected float32 \[7, 2\]"),
    ({"packed": None}, "packed is a NoneType"),
    ({"scale": np.ones((8, 3), np.float32)}, r"scale is float32 \[8, 3\], expected float32 \[8, 2\]"),
    ({"scale": np.ones((8, 2), np.float16)}, "scale is float16"),
    ({"zero": np.zeros((8, 1), np.int8)}, r"zero is int8 \[8, 1\], expected int8 \[8, 2\]"),
    ({"zero": np.zeros((8, 2), np.int32)}, "zero is int32"),
    ({"zero": np.zeros((2, 8), np.int8).T}, "zero .* has strides"),
    ({"bits": 1}, "bits is 1, expected an integer from 2 to 8"),
    ({"bits": 9}, "bits is 9"),
    ({"bits": 4.0}, "bits is 4.0"),
    ({"bits": True}, "bits is True"),
    ({"group_size": 0}, "group_size is 0, expected an integer from 1"),
    ({"group_size": -32}, "group_size is -32"),
    ({"group_size": 24}, "group_size 24 does not divide 64 columns"),
    ({"group_size": 64}, r"scale is float32 \[8, 2\], expected float32 \[8, 1\]"),
    ({"threads": 0}, "threads is 0, expected an integer from 1 to 1024"),
    ({"threads": 5000}, "threads is 5000"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_packed_linear_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    assert cpu.packed_linear(**GOOD).shape == (2, 8)
    with pytest.raises(KernelError, match=message):
        cpu.packed_linear(**{**GOOD, **change})


@pytest.mark.parametrize("name", ["packed", "scale", "zero", "bits", "threads"])
def test_dequantize_refuses_what_does_not_fit(name: str) -> None:
    good = {key: value for key, value in GOOD.items() if key != "x"}
    assert cpu.dequantize(**good).shape == (8, 64)
    for change, _ in WRONG:
        if name in change:
            with pytest.raises(KernelError, match=r"^dequantize: "):
                cpu.dequantize(**{**good, **change})


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (
            np.zeros((1, 8), np.float32),
            np.zeros((4, 9), np.uint16),
            r"weight is uint16 \[4, 9\], .*\[any, 8\]",
        ),
        (np.zeros((1, 8), np.float32), np.zeros((4, 8), np.int16), "weight is int16"),
        (np.zeros((1, 8), np.float32), np.zeros((8, 4), np.uint16).T, "has strides"),
        (np.zeros((1, 8), np.float16), np.zeros((4, 8), np.uint16), "x is float16"),
        (np.zeros((1, 0), np.float32), np.zeros((4, 0), np.uint16), "has no columns"),
        (np.zeros((1, 8), np.float32), None, "weight is a NoneType"),
    ],
)
def test_dense_linear_refuses_what_does_not_fit(x: Any, weight: Any, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        cpu.dense_linear_bf16(x, weight, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.unpack_codes(np.zeros((1, 4), np.int32), 0, 8), "bits is 0"),
        (lambda: cpu.unpack_codes(np.zeros((1, 4), np.int32), 4, -1), "columns is -1"),
        (
            lambda: cpu.unpack_codes(np.zeros((1, 4), np.int32), 4, 33),
            r"packed is int32 \[1, 4\], .*\[any, 5\]",
        ),
        (lambda: cpu.unpack_codes(np.zeros((1, 4), np.uint32), 4, 32), "packed is uint32"),
        (lambda: cpu.unpack_codes(np.zeros((4, 2), np.int32).T, 4, 32), "has strides"),
        (lambda: cpu.pack_codes(np.zeros((1, 4), np.uint8), 8), "codes is uint8"),
        (lambda: cpu.pack_codes(np.zeros(4, np.int8), 8), r"codes is int8 \[4\]"),
        (lambda: cpu.pack_codes(np.zeros((1, 4), np.int8), 9), "bits is 9"),
        (lambda: cpu.read_bytes(np.zeros(4, np.int8), 1), "data is int8"),
    ],
)
def test_packing_refuses_what_does_not_fit(call: Callable[[], object], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call()


def test_extension_itself_refuses_arrays_that_disagree() -> None:
    """The checks in Python word the errors; those in C++ make sure that not even a direct call leaves its arrays."""
    x, packed, scale, zero = (GOOD[name] for name in ("x", "packed", "scale", "zero"))
    y = np.zeros((2, 8), np.float32)
    extension = cpu.extension()
    bad: list[tuple[Any, ...]] = [
        (x[:, :63].copy(), packed, scale, zero, 4, 1, y),
        (x, packed[:7], scale, zero, 4, 1, y),
        (x, packed, scale[:, :0].copy(), zero, 4, 1, y),
        (x, packed, scale, zero[:, :1].copy(), 4, 1, y),
        (x, packed, scale, zero, 9, 1, y),
        (x, packed, scale, zero, 4, 0, y),
        (x, packed, scale, zero, 4, 1, y[:1]),
        (x, packed, scale, zero, 4, 1, y[:, :7].copy()),
        (x, packed, scale, zero, 4, 1, y.astype(np.float64)),
        (x.astype(np.float64), packed, scale, zero, 4, 1, y),
        (x[:, ::2], packed, scale, zero, 4, 1, y),
        (x, packed, scale, "zero", 4, 1, y),
    ]
    for arguments in bad:
        with pytest.raises((ValueError, TypeError)):
            extension.packed_linear(*arguments)
    with pytest.raises(ValueError, match="differ in shape"):
        extension.unpack_codes(packed, np.zeros((8, 65), np.int8), 4)
    with pytest.raises(ValueError, match="does not fit"):
        extension.dense_linear_bf16(x, np.zeros((8, 65), np.uint16), 1, y)
    with pytest.raises(ValueError, match="out does not fit"):
        extension.dequantize(packed, scale, zero, 4, 1, np.zeros((9, 64), np.float32))


def test_extension_does_not_write_to_a_read_only_array() -> None:
    y = np.zeros((2, 8), np.float32)
    y.flags.writeable = False
    with pytest.raises(TypeError):
        cpu.extension().packed_linear(GOOD["x"], GOOD["packed"], GOOD["scale"], None, 4, 1, y)


def test_read_only_arguments_are_taken() -> None:
    x = GOOD["x"].copy()
    x.flags.writeable = False
    assert cpu.packed_linear(**{**GOOD, "x": x}).shape == (2, 8)
