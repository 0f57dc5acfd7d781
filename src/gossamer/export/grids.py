"""Integer grids as other formats say them: whole steps from zero, and scales for narrower groups. Knows no format."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Codes, Integer


def steps(codes: Codes) -> Tensor:
    """int16 [out, in]: codes less their zero points; the weight is steps * scale of the group."""
    whole = codes.codes.to(torch.int16)
    if codes.zero is None:
        return whole
    return whole - spread(codes.zero.to(torch.int16), whole.shape[1], 1)


def unsigned(form: Integer, values: Tensor) -> Tensor:
    """int32 codes or zero points counted from the lowest code."""
    return values.to(torch.int32) + (1 << (form.bits - 1))


def zeros(form: Integer, codes: Codes) -> Tensor:
    """int32 [out, groups]: zero points counted from the lowest code; symmetric grids have theirs in the middle."""
    if codes.zero is None:
        return torch.full(codes.scale.shape, 1 << (form.bits - 1), dtype=torch.int32)
    return unsigned(form, codes.zero)


def divides(codes: Codes, width: int) -> bool:
    """True if groups of `width` columns never straddle two groups of these codes."""
    columns, groups = codes.codes.shape[1], codes.scale.shape[1]
    return columns % width == 0 and (columns // groups) % width == 0


def spread(values: Tensor, columns: int, width: int) -> Tensor:
    """Values of groups [out, groups] for groups of `width` columns: [out, columns / width]."""
    return values.repeat_interleave(columns // width // values.shape[1], dim=1)


def as_half(values: Tensor) -> Tensor | None:
    """float16 of the same values, or None if float16 does not hold them."""
    half = values.to(torch.float16)
    return half if torch.equal(half.float(), values.float()) else None
