"""GGML's block types: how large their blocks are, and the floats that blocks stand for. Knows no file and no model.

The types of most files are computed here; the rest are left to the gguf package, which takes longer to import than a
small model takes to open, and is therefore imported only for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""GGML type number -> name, weights per block, bytes per block."""
SIZES = {name: (block, size) for name, block, size in TYPES.values()}
"""Name -> weights per block, bytes per block."""


def dequantize(kind: str, data: Tensor) -> Tensor:
    """float32 [..., weights] from rows of whole blocks, uint8 [..., bytes]; the last bit is the gguf package's."""
    block, size = SIZES[kind]
    shape = (*data.shape[:-1], data.shape[-1] // size * block)
    if data.numel() == 0:
        return torch.empty(shape)
    if kind in _OWN:
        return _OWN[kind](data.reshape(-1, size)).reshape(shape)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as theirs

    return torch.from_numpy(np.asarray(theirs(data.numpy(), GGMLQuantizationType[kind]), np.float32))


@functools.cache
def has_floats(kind: str) -> bool:
    """Whether blocks of this type can be turned into floats."""
    try:
        dequantize(kind, torch.zeros(1, SIZES[kind][1], dtype=torch.uint8))
    except NotImplementedError:
        return False
    return True


def _q4_0(blocks: Tensor) -> Tensor:
    """Half scale, then 16 bytes of codes less 8."""
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_halves(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Tensor:
    """Half scale and minimum, then 16 bytes of codes."""
    scales = _halves(blocks[:, :4])
    return _nibbles(blocks[:, 4:]).mul_(scales[:, :1]).add_(scales[:, 1:])


def _q8_0(blocks: Tensor) -> Tensor:
    """Half scale, then 32 signed bytes."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks[:, :2]))


_OWN: dict[str, Callable[[Tensor], Tensor]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
"""Blocks uint8 [blocks, bytes] -> float32 [blocks, weights]."""


def _halves(data: Tensor) -> Tensor:
    """float32 [blocks, n] from the bytes of n float16 numbers."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """float32 [blocks, 32] from bytes [blocks, 16]: the low halves of all of them, then the high ones."""
    out = torch.empty(len(data), 2, data.shape[1])
    out[:, 0] = data & 15
    out[:, 1] = data >> 4
    return out.view(len(data), -1)
