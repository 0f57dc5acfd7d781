"""Round to nearest: every weight to the closest point of its group's grid. Needs no data."""

from __future__ import annotations

from torch import Tensor

from ...formats import Codes, Format
from ..method import Needs, QuantizeOptions, Quantizer
from .grid import grid_of, quantize


class RTN(Quantizer):
    """Round to nearest, with the range that covers the group (clip: none) or of least squared error (clip: mse)."""

    name = "rtn"
    needs = Needs.NOTHING
    Options = QuantizeOptions

    def quantize(self, weight: Tensor, form: Format, hessian: Tensor | None, gradient: Tensor | None = None) -> Codes:
        """Codes of a float32 weight [out, in]; no statistic is looked at. Raises ShapeMismatch, NumericalError."""
        return quantize(weight, *grid_of(weight, form, self.options.clip), form)
