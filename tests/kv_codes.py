"""What a 4-bit KV cache holds of keys and values: the formula that the C++ executor is compared with.

Of a head [head_dim] the Walsh-Hadamard transform t is stored, in groups of 64 columns: with low the greatest bfloat16
not above the least of a group, and step the least bfloat16 not below (high - low) / 15, as
low + step * round((t - low) / step).
"""

from __future__ import annotations

import math

import torch

GROUP = 64


def hadamard(size: int) -> torch.Tensor:
    """The orthogonal matrix [size, size] of the transform, float64: blocks of falling powers of two."""
    blocks = []
    while size:
        n = 1 << (size.bit_length() - 1)
        signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
        blocks.append(torch.tensor(signs, dtype=torch.float64) / math.sqrt(n))
        size -= n
    return torch.block_diag(*blocks)


def toward(value: torch.Tensor, up: bool) -> torch.Tensor:
    """float32 numbers as the nearest bfloat16 ones not below (up) or not above."""
    near = value.bfloat16().float()
    wrong = near < value if up else near > value
    step = torch.nextafter(near.bfloat16(), torch.tensor(math.inf if up else -math.inf, dtype=torch.bfloat16))
    return torch.where(wrong, step.float(), near)


def stored(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache holds of x [tokens, head_dim], transformed back, float64; and half a step of every column."""
    turn = hadamard(x.shape[1])
    t = (x.double() @ turn).float()
    held, halves = torch.empty_like(t), torch.empty_like(t)
    for group in range(0, t.shape[1], GROUP):
        part = t[:, group : group + GROUP]
        low = toward(part.amin(1, keepdim=True), up=False)
        step = toward((part.amax(1, keepdim=True) - low) * (1 / 15), up=True)
        codes = torch.where(step > 0, (part - low) / step, torch.zeros_like(part)).round().clamp(0, 15)
        held[:, group : group + GROUP] = codes * step + low
        halves[:, group : group + GROUP] = step / 2
    return held.double() @ turn, halves.double()
