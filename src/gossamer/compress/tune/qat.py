"""Quantization-aware training of the whole model by its own generations (LLM-QAT: Liu et al., arXiv 2305.17888).

The weights behind the codes are trained, and rounded in every forward pass with a straight-through gradient; what they
round to in the end is stored. Training begins at the codes that are there: each weight is the original's, moved into
the cell of its code, so that those near a border are the first to cross it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ...errors import CompressionError
from ...formats import Integer
from ..blockwise import CELL
from ..tunedlinear import TunedLinear
from ..tuning import TunedModel
from . import ModelTuner, TuneOptions, distill, groups_of


class QATOptions(TuneOptions):
    learning_rate: float = Field(default=0.01, ge=0, description="of weights, in mean steps of their layer's grid")
    scale_rate: float = Field(
        default=1e-3, ge=0, description="of scales, relative to their mean size in a layer; 0: fixed"
    )
    zero_rate: float = Field(default=0.01, ge=0, description="of zero points; 0: fixed")


class QAT(ModelTuner):
    """Trains weights, scales, zero points and norms by the KL divergence from the original."""

    name = "qat"
    latent = True
    Options = QATOptions
    options: QATOptions

    def tune(self, model: TunedModel) -> None:
        """Train everything. Raises CompressionError for formats without a scale for each group, NumericalError."""
        o = self.options
        begin_latent(model, scales=bool(o.scale_rate), zeros=bool(o.zero_rate), norms=o.norms)
        rates = {"latent": o.learning_rate, "scale": o.scale_rate, "zero": o.zero_rate, "weight": o.norm_rate}
        distill(model, groups_of(model, **rates), o)


def begin_latent(model: TunedModel, *, scales: bool, zeros: bool, norms: bool) -> None:
    """Make the weights trainable, and scales, zero points and norms if so said.

    A weight begins where it rounds to its code, as near to the original as that allows; at what the code stands for
    where the original is not known, because scales were folded through the model.
    """
    with torch.no_grad():
        values = {name: layer.weight().clone() for name, layer in model.linears().items()}
    try:
        model.trainable(scales=scales, zeros=zeros, norms=norms, ends=scales, latent="weights")
    except CompressionError:
        model.trainable(scales=scales, zeros=zeros, norms=norms, ends=scales, latent="codes")
        return
    with torch.no_grad():
        for name, layer in model.linears().items():
            assert layer.latent is not None
            layer.latent.copy_(nearest_start(layer, values[name]))


def nearest_start(layer: TunedLinear, value: Tensor) -> Tensor:
    """The latent weight [out, in] moved as little as may be to where it rounds to `value` [out, in].

    On a codebook, whose cells are of many sizes, a weight outside of its cell begins at the value itself.
    """
    assert layer.latent is not None
    assert layer.scale is not None
    if isinstance(layer.form, Integer):
        reach = CELL * layer.scale.unsqueeze(-1)
        away = (layer.latent - value).view(*layer.scale.shape, -1)
        return value + away.clamp(-reach, reach).view_as(value)
    return torch.where(layer.weight() == value, layer.latent, value)
