"""Scales tuned end to end (E2E-QP, the second phase of EfficientQAT: Chen et al., arXiv 2407.11062).

The codes and zero points stay; every scale of the model, a packed embedding's too, and its norms are trained over the
whole model at once. They are a few percent of the numbers, so they cannot learn the calibration text by heart.
"""

from __future__ import annotations

from pydantic import Field

from ..tuning import TunedModel
from . import ModelTuner, TuneOptions, distill, groups_of


class ScalesOptions(TuneOptions):
    learning_rate: float = Field(default=2e-3, ge=0, description="of scales, relative to their mean size in a layer")


class Scales(ModelTuner):
    """Trains scales and norms by the KL divergence from the original."""

    name = "scales"
    Options = ScalesOptions
    options: ScalesOptions

    def tune(self, model: TunedModel) -> None:
        """Train the scales. Raises NumericalError if a scale is not finite in the end."""
        o = self.options
        model.trainable(scales=True, norms=o.norms, ends=True)
        distill(model, groups_of(model, scale=o.learning_rate, levels=o.learning_rate, weight=o.norm_rate), o)
