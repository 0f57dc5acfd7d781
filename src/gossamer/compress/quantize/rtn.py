"""Round to nearest: every weight to the closest point of its group's grid. Needs no data."""

from __future__ import annotations

from torch import Tensor

from ...formats import Codes, Integer
from ..method import Needs, QuantizeOptions, Quantizer
from .grid import grid_of, quantize


class RTN(Quantizer):
    """Round to nearest, with the range that covers the group (clip: none) or of least squared error (clip: mse)."""

    name = "rtn"
    needs = Needs.NOTHING
    Options = QuantizeOptions

    def quantize(self, weight: Tensor, form: Integer, hessian: Tensor | None) -> Codes:
        """Codes of a float32 weight [out, in]; `hessian` is not looked at. Raises ShapeMismatch, NumericalError."""
        return quantize(weight, *grid_of(weight, form, self.options.clip), form)
