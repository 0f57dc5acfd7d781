"""SmoothQuant: large activations made smaller and the weights behind them larger, so that both fit 8 bits.

Xiao et al., arXiv 2211.10438. Weights get one scale per row; activations are meant to be rounded as the model runs,
with one scale per token, which engines do by themselves where weights are of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...model import ModelConfig
from ..blockview import BlockView
from ..method import BlockQuantizer, QuantizeOptions
from ..walk import TOKENS_AT_ONCE
from .fold import Roles, carries, fold
from .grid import grid_of, quantize

TINY = 1e-5
"""Least activation or weight of a channel, as a share of the largest: one that is never used gets a scale, too."""


class SmoothQuantOptions(QuantizeOptions):
    bits: int = Field(8, ge=2, le=8, description="bits per weight: 2, 3, 4, 5, 6 or 8")
    group_size: int | Literal["channel", "auto"] = Field("channel", description="columns that share a scale")
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the difficulty goes to the weights: 1 is all of it")
    points: Literal["norms", "all"] = Field(
        "norms", description="norms: scales folded into norms, as in the paper; all: into the rows of v and up as well"
    )


class SmoothQuant(BlockQuantizer):
    """Folds s = max|x|^alpha / max|W|^(1 - alpha) for each input channel, then rounds weights to nearest."""

    name = "smoothquant"
    Options = SmoothQuantOptions
    options: SmoothQuantOptions

    def compress(self, view: BlockView) -> None:
        """Fold, then decide every linear layer of a block. Raises NumericalError, ShapeMismatch."""
        for roles in view.points:
            self._smooth(view, roles)
        for role in view.roles:
            weight, form = getattr(view.block, role).weight, view.form(role)
            view.put(role, quantize(weight, *grid_of(weight, form, self.options.clip), form))

    def peak_bytes(self, config: ModelConfig, index: int, sequences: int, length: int) -> int:
        """A few copies of the largest weight, and a step's activations."""
        layer = config.layers[index]
        largest = max(rows * columns for rows, columns in layer.linear_shapes(config.hidden_size).values())
        activations = 6 * max(TOKENS_AT_ONCE, length) * (layer.ffn_width + layer.q_size + config.hidden_size)
        return 4 * (4 * largest + activations)

    def _smooth(self, view: BlockView, roles: Roles) -> None:
        activations = largest(view.inputs(roles[0]))
        wanted = self.options.points == "all" or roles[0] not in ("o", "down")
        if not carries(view, roles, activations) or not wanted:
            return
        weights = torch.cat([getattr(view.block, role).weight for role in roles])
        fold(view.block, roles, smoothing(activations, weights.abs().amax(0), self.options.alpha))


def largest(inputs: Iterable[Tensor]) -> Tensor:
    """max |x| [in] over inputs [.., in]."""
    return torch.stack([x.abs().flatten(0, -2).amax(0) for x in inputs]).amax(0)


def smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Scales [in] for channels of these largest activations [in] and weights [in] (equation 4)."""
    activations = activations.clamp(min=TINY * float(activations.max()))
    weights = weights.clamp(min=max(TINY * float(weights.max()), torch.finfo(torch.float32).tiny))
    return activations.pow(alpha) / weights.pow(1 - alpha)
