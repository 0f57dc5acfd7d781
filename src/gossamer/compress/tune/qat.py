"""Quantization-aware training of the whole model by its own generations (LLM-QAT: Liu et al., arXiv 2305.17888).

The weights behind the codes are trained, and rounded in every forward pass with a straight-through gradient; what they
round to in the end is stored. Training begins at the codes that are there: each weight is the original's, moved into
the cell of its code, so that those near a border are the first to cross it.
"""

from __future__ import annotations

import functools

from pydantic import Field

from ...errors import CompressionError
from ...model import ModelConfig
from ..tuning import TunedModel
from . import ModelTuner, TuneOptions, distill, groups_of


class QATOptions(TuneOptions):
    learning_rate: float = Field(default=2e-3, ge=0, description="of weights, in mean steps of their layer's grid")
    scale_rate: float = Field(
        default=1e-3, ge=0, description="of scales, relative to their mean size in a layer; 0: fixed"
    )
    zero_rate: float = Field(default=0.0, ge=0, description="of zero points, in steps; 0: fixed")
    ends: bool = Field(default=True, description="train the weights of a packed embedding and head too")


class QAT(ModelTuner):
    """Trains weights, scales, zero points and norms by the KL divergence from the original."""

    name = "qat"
    latent = True
    Options = QATOptions
    options: QATOptions

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        """That of every tuner of weights, with embedding and head, which may be packed."""
        ends = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
        return super().peak_bytes(config, sequences, length) + 16 * ends * self.options.ends

    def tune(self, model: TunedModel) -> None:
        """Train everything. Raises CompressionError for formats without a scale for each group, NumericalError."""
        o = self.options
        begin_latent(model, scales=bool(o.scale_rate), zeros=bool(o.zero_rate), norms=o.norms, ends=o.ends)
        rates = {"latent": o.learning_rate, "scale": o.scale_rate, "zero": o.zero_rate, "weight": o.norm_rate}
        distill(model, groups_of(model, **rates), o)


def begin_latent(model: TunedModel, *, scales: bool, zeros: bool, norms: bool, ends: bool) -> None:
    """Make the weights trainable, and scales, zero points and norms if so said; with `ends` those of packed ends too.

    The weights begin near the original's; at what the codes stand for where scales were folded through the model, and
    the original's do not fit it any more.
    """
    train = functools.partial(model.trainable, scales=scales, zeros=zeros, norms=norms, ends=scales, latent_ends=ends)
    try:
        train(latent="weights")
    except CompressionError:
        train(latent="codes")
