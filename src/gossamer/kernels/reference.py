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


def look_up(packed: Tensor, levels: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """float32 [out, in] = levels[code] * scale; packed [out, words], scale [out, groups].

    levels float32 [2^bits] of all rows, or [out, 2^bits]; a code is stored as it is, from 0.
    """
    out, groups = scale.shape
    codes = unpack_codes(packed, bits, columns).long() + 2 ** (bits - 1)
    values = levels[codes] if levels.ndim == 1 else levels.gather(1, codes)
    return (values.view(out, groups, columns // groups) * scale.unsqueeze(-1)).view(out, columns)


def linear_table(x: Tensor, packed: Tensor, levels: Tensor, scale: Tensor, bits: int) -> Tensor:
    """float32 [tokens, out] from x float32 [tokens, in]; the weight is as for look_up."""
    return x @ look_up(packed, levels, scale, bits, x.shape[1]).T


def linear_sparse(x: Tensor, pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """float32 [tokens, out] from x [tokens, in] and the sparse rows of a weight: pointers [out + 1], the others [n]."""
    rows = torch.repeat_interleave(torch.arange(len(pointers) - 1), pointers.diff())
    y = torch.zeros(len(x), len(pointers) - 1)
    return y.index_add_(1, rows, x[:, columns.long()] * values.float())
