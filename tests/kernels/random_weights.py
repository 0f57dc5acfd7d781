"""Random packed weights, and what they stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gossamer.kernels import reference


@dataclass(frozen=True)
class Weight:
    """A random packed weight [out, in] and what it stands for."""

    codes: torch.Tensor
    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group_size: int

    @property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """packed, scale and zero as arrays."""
        return self.packed.numpy(), self.scale.numpy(), None if self.zero is None else self.zero.numpy()

    def exact(self) -> torch.Tensor:
        """The weight in float64."""
        zero = 0.0 if self.zero is None else self._wide(self.zero.double())
        return (self.codes.double() - zero) * self._wide(self.scale.double())

    def magnitude(self) -> torch.Tensor:
        """What a kernel that works on stored codes adds up: (|code| + |zero| + 2 * offset) * scale, in float64."""
        zero = 0.0 if self.zero is None else self._wide(self.zero.double().abs())
        return (self.codes.double().abs() + zero + 2**self.bits) * self._wide(self.scale.double())

    def _wide(self, per_group: torch.Tensor) -> torch.Tensor:
        return per_group.repeat_interleave(self.group_size, dim=1)


def random_weight(
    out: int, columns: int, bits: int, group_size: int | None = None, asymmetric: bool = False, seed: int = 0
) -> Weight:
    """Codes over their whole range, scales between 0.1 and 1, and zero points if asymmetric."""
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    groups = 1 if group_size is None else columns // group_size
    codes = torch.randint(-half, half, (out, columns), generator=generator).to(torch.int8)
    scale = torch.rand(out, groups, generator=generator) * 0.9 + 0.1
    zero = torch.randint(-half, half, (out, groups), generator=generator).to(torch.int8) if asymmetric else None
    return Weight(codes, reference.pack_codes(codes, bits), scale, zero, bits, columns // groups)
