"""The oracle: every kernel once more in plain torch, with no C++ and nothing shared with it.

Slow on purpose where that keeps it plain. Other kernels are compared with these; GOSSAMER_KERNELS=reference runs them.
Codes lie in a row as dense little-endian bits: element i from bit i * bits on, stored as code + 2^(bits-1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes int8 [rows, columns] from packed int32 [rows, words]."""
    position = torch.arange(columns) * bits
    word, shift = position // 32, position % 32
    wide = packed.long() & 0xFFFFFFFF
    wide = torch.cat((wide, torch.zeros_like(wide[:, :1])), dim=1)  # a code may end in the word after its own
    both = wide[:, word] | (wide[:, (word + 1).clamp(max=wide.shape[1] - 1)] << 32)
    codes: Tensor = ((both >> shift) & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.to(torch.int8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed int32 [rows, ceil(columns * bits / 32)] from codes int8 [rows, columns]."""
    rows, columns = codes.shape
    stored = codes.long() + 2 ** (bits - 1)
    digits = (stored.unsqueeze(-1) >> torch.arange(bits)) & 1  # [rows, columns, bits]
    stream = torch.nn.functional.pad(digits.view(rows, columns * bits), (0, -columns * bits % 32))
    words = (stream.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """float32 [out, in] = (codes - zero) * scale; packed [out, words], scale and zero [out, in / group_size]."""
    out, groups = scale.shape
    codes = unpack_codes(packed, bits, groups * group_size).view(out, groups, group_size).float()
    if zero is not None:
        codes = codes - zero.float().unsqueeze(-1)
    return (codes * scale.unsqueeze(-1)).view(out, groups * group_size)


def linear_packed(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """float32 [tokens, out] from x float32 [tokens, in]."""
    return x @ dequantize(packed, scale, zero, bits, group_size).T


def linear_dense(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [tokens, out] from x float32 [tokens, in] and a weight [out, in] of any float dtype."""
    return x @ weight.float().T
