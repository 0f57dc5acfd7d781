"""Mean and variance of what linear layers read, gathered as the calibration passes through a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NumericalError
from ...model.decoder import Block, Rotation
from ..walk import advance


class Moments:
    """Of inputs [.., in], by column, in float64; merged part by part, so that no mean is needed first."""

    def __init__(self, columns: int) -> None:
        self.count = 0
        self.mean = torch.zeros(columns, dtype=torch.float64)
        """[in]"""
        self._spread = torch.zeros(columns, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1])
        if not torch.isfinite(x).all():
            raise NumericalError("activations are not finite", hint="the checkpoint is damaged")
        variance, mean = torch.var_mean(x.double(), 0, correction=0)
        total = self.count + len(x)
        shift = mean - self.mean
        self._spread += variance * len(x) + shift.square() * (self.count * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """[in], of a sample"""
        return self._spread / max(self.count - 1, 1)

    @property
    def squares(self) -> Tensor:
        """[in] mean square"""
        return self._spread / max(self.count, 1) + self.mean.square()


@torch.no_grad()
def advance_watched(block: Block, x: Tensor, rotation: Rotation) -> dict[str, Moments]:
    """Carry the residual stream x [sequences, time, hidden] through a block; moments of the inputs of o and down."""
    seen = {"o": Moments(block.layer.q_size), "down": Moments(block.layer.ffn_width)}
    advance(block, x, rotation, lambda role, inputs: seen[role].add(inputs))
    return seen
