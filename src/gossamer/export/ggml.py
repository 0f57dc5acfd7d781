"""Our codes as blocks of GGML types, byte for byte what they were: no number is rounded here. Knows no file.

    Q4_0, Q5_0, Q8_0   steps of 4, 5, 8 bits times a float16 scale for each 32 columns
    Q4_1, Q5_1         codes of 4, 5 bits times a float16 scale, plus a float16 minimum
    MXFP4              E2M1 with a power of two for each 32 columns
    NVFP4              E2M1 with E4M3 for each 16 columns, 64 to a block; one float of the tensor lies beside it
A type holds a weight if its scales (and minima, which are zero point times scale) are float16 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import Codebook, Codes, Format, Integer
from .grids import as_half, divides, spread, steps, unsigned, zeros

BLOCK = 32
SYMMETRIC = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
AFFINE = {"Q4_1": 4, "Q5_1": 5}
BY_SIZE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FLOATS = {"mxfp4": "MXFP4", "nvfp4": "NVFP4"}
"""Kind of a codebook -> the GGML type that is the same."""


def exact_kind(form: Format, codes: Codes, kinds: Sequence[str]) -> str | None:
    """The smallest of these GGML types that holds the codes as they are, or None."""
    if isinstance(form, Codebook):
        kind = FLOATS.get(form.kind)
        fits = codes.codes.shape[1] % (64 if kind == "NVFP4" else BLOCK) == 0
        return kind if kind in kinds and fits else None
    return next((kind for kind in BY_SIZE if kind in kinds and is_exact(kind, form, codes)), None)


def is_exact(kind: str, form: Format, codes: Codes) -> bool:
    """True if this type of integers holds these codes as they are."""
    if not isinstance(form, Integer) or codes.outliers is not None or not divides(codes, BLOCK):
        return False
    if as_half(codes.scale) is None:
        return False
    if kind in SYMMETRIC:
        low, high = (int(n) for n in torch.aminmax(steps(codes)))
        half = 1 << (SYMMETRIC[kind] - 1)
        return -half <= low and high < half
    return form.bits <= AFFINE[kind] and as_half(minima(form, codes)) is not None


def minima(form: Integer, codes: Codes) -> Tensor:
    """float32 [out, groups]: what the lowest code stands for."""
    return -zeros(form, codes).float() * codes.scale.float()


def encode(kind: str, form: Format, codes: Codes) -> Tensor:
    """uint8 [out, bytes of a row]: the blocks of a weight that this type holds."""
    assert isinstance(form, Integer)  # those of a codebook are encoded from its stored tensors
    columns = codes.codes.shape[1]
    scale = _halves(spread(codes.scale, columns, BLOCK))
    if kind in SYMMETRIC:
        bits = SYMMETRIC[kind]
        if bits == 8:
            parts = [scale, steps(codes).to(torch.int8).view(torch.uint8).view(-1, BLOCK)]
        else:
            parts = [scale, *_bits((steps(codes) + (1 << (bits - 1))).view(-1, BLOCK), bits)]
    else:
        lowest = _halves(spread(minima(form, codes), columns, BLOCK))
        parts = [scale, lowest, *_bits(unsigned(form, codes.codes).view(-1, BLOCK), AFFINE[kind])]
    return torch.cat(parts, dim=1).view(codes.codes.shape[0], -1)


def encode_floats(kind: str, tensors: dict[str, Tensor]) -> Tensor:
    """uint8 [out, bytes of a row] from the stored tensors of mxfp4 or nvfp4."""
    packed = tensors["weight_packed"]
    out = packed.shape[0]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(out, -1)
    scale = tensors["weight_scale"].view(torch.uint8)
    if kind == "MXFP4":
        blocks = _nibbles(codes.view(-1, BLOCK))
        return torch.cat([scale.reshape(-1, 1), blocks], dim=1).view(out, -1)
    blocks = _nibbles(codes.view(-1, 16)).view(-1, 32)
    return torch.cat([scale.reshape(-1, 4), blocks], dim=1).view(out, -1)


def _bits(codes: Tensor, bits: int) -> list[Tensor]:
    """Bytes of blocks of codes from 0 [blocks, 32]: fifth bits first, if there are any, then the nibbles."""
    nibbles = _nibbles((codes & 15).to(torch.uint8))
    if bits == 4:
        return [nibbles]
    fifth = (codes >> 4 & 1).to(torch.uint8).view(-1, 4, 8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return [(fifth * powers).sum(-1, dtype=torch.uint8), nibbles]


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [blocks, n / 2] from codes [blocks, n]: the first half in the low bits, the second in the high ones."""
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def _halves(values: Tensor) -> Tensor:
    """uint8 [n, 2]: the bytes of float16 numbers."""
    return values.to(torch.float16).contiguous().view(-1, 1).view(torch.uint8)
