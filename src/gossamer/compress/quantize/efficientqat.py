"""EfficientQAT's first phase, Block-AP (Chen et al., arXiv 2407.11062): every weight, scale and zero point of a block.

All parameters are trained with straight-through rounding so that the block gives what the original gave. Its second
phase, over the whole model, is `tune/scales.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from ...formats import Codes
from ..blockview import BlockView
from ..blockwise import RoundedLearner, RoundedOptions, Start, learn, starts_of
from ..fakequant import codes_of_steps, round_steps


class EfficientQATOptions(RoundedOptions):
    learning_rate: float = Field(default=2e-3, ge=0, description="of weights, in steps of their grid")
    scale_rate: float = Field(default=2e-4, ge=0, description="of scales, relative to them")
    zero_rate: float = Field(default=0.0, ge=0, description="of zero points, in steps; 0: fixed")


class EfficientQAT(RoundedLearner):
    """Trains a block's weights, scales and zero points with Adam, from the codes of GPTQ or of rounding."""

    name = "efficientqat"
    Options = EfficientQATOptions
    options: EfficientQATOptions

    def compress(self, view: BlockView) -> None:
        """Decide every linear layer of a block. Raises NumericalError, ShapeMismatch, CompressionError."""
        o = self.options
        layers = {role: TrainedWeight(start) for role, start in starts_of(view, o).items()}
        groups = [
            {"params": [layer.steps for layer in layers.values()], "rate": o.learning_rate},
            {"params": [layer.log_scale for layer in layers.values()], "rate": o.scale_rate},
            {"params": [layer.zero for layer in layers.values() if layer.zero is not None], "rate": o.zero_rate},
        ]
        optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)

        def weights() -> Mapping[str, Tensor]:
            return {f"{role}.weight": layer.weight() for role, layer in layers.items()}

        learn(view, weights, optimizer, o)
        for role, layer in layers.items():
            view.put(role, layer.codes())


class TrainedWeight:
    """One linear layer whose weights, scales and zero points are parameters.

    Weights are in steps of their grid and scales move by factors, so that one learning rate serves all.
    """

    def __init__(self, start: Start) -> None:
        self.form, self._first = start.form, start.scale
        grouped = start.weight.view(*start.scale.shape, -1) / start.scale.unsqueeze(-1)
        self.steps = nn.Parameter(grouped.view_as(start.weight))
        """[out, in]"""
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale))
        self.zero = None if start.zero is None else nn.Parameter(start.zero.clone())

    def weight(self) -> Tensor:
        """The rounded weight [out, in]."""
        return round_steps(self.steps, self._scale(), self.zero, self.form)

    def codes(self) -> Codes:
        """What `weight` stands for."""
        return codes_of_steps(self.steps, self._scale(), self.zero, self.form)

    def _scale(self) -> Tensor:
        return self._first * self.log_scale.exp()
