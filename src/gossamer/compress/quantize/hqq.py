"""Half-quadratic quantization: the grid of each group by an error that forgives outliers. Needs no data.

HQQ (Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, mobiusml.github.io/hqq_blog).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import CompressionError
from ...formats import Codes, Format, Integer
from ..method import Needs, QuantizeOptions, Quantizer
from .grid import grid_of, quantize

WEIGHTS_AT_ONCE = 1 << 20
"""Bounds the temporary memory, and keeps it in the caches."""
RANGES = (1.0, 0.85, 0.7, 0.55)
"""What the descents begin from, as shares of the grid that `clip` gives. Codes and grid hold each other in place, so a
descent ends near where it began: the loss has many valleys, and the best is often of a narrower grid."""


class HQQOptions(QuantizeOptions):
    norm: float = Field(0.7, gt=0, lt=1, description="p: the sum of |error|^p is what is made small")
    beta: float = Field(10.0, gt=0, description="first weight of the quadratic part, with errors in steps of the grid")
    growth: float = Field(1.01, ge=1, description="beta's factor from one iteration to the next")
    iterations: int = Field(20, ge=1, le=1000)

    @model_validator(mode="after")
    def _only_integers(self) -> HQQOptions:
        others = [grid.format for grid in (self, *self.layers.values()) if grid.format != "int"]
        if others:
            raise ValueError(f"hqq moves the scales and zero points of integers, not those of {others[0]}")
        return self


class HQQ(Quantizer):
    """Alternates between the errors that are left to outliers and the grid of least squared error for the rest.

    The paper moves a zero point that is a fraction. Here zero points are whole numbers, as they are stored, so the
    scale moves as well, by the same least squares; a symmetric grid has nothing else to move. The descent is repeated
    from narrower grids (RANGES), and every group keeps the best that it saw.
    """

    name = "hqq"
    needs = Needs.NOTHING
    Options = HQQOptions
    options: HQQOptions

    def quantize(self, weight: Tensor, form: Format, hessian: Tensor | None, gradient: Tensor | None = None) -> Codes:
        """Codes of a float32 weight [out, in]; neither statistic is looked at.

        No group has a larger sum of |error|^p than on the grid that it begins from (`clip`). Raises CompressionError
        for a format without evenly spaced codes, ShapeMismatch, NumericalError.
        """
        grid = form.grid
        if not isinstance(grid, Integer):
            raise CompressionError(f"hqq moves the grid of integers, {form.name} has none", hint="use the method rtn")
        rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
        return Codes.cat([self._rows(part, grid) for part in torch.split(weight, rows)])

    def _rows(self, weight: Tensor, form: Integer) -> Codes:
        scale, zero = grid_of(weight, form, self.options.clip)
        groups = weight.view(*scale.shape, -1)
        first = _Grid(scale.unsqueeze(-1), zero.unsqueeze(-1))
        # Errors are measured in steps of the grid that a group begins from: an outlier is one in any unit.
        unit = first.scale
        best, least = first, _lost(groups, first, form, unit, self.options.norm)
        for share in RANGES:
            begin = _Grid((unit * share).to(form.scale_dtype).float(), first.zero)
            for grid in self._descent(groups, begin, form, unit):
                lost = _lost(groups, grid, form, unit, self.options.norm)
                better = lost < least
                least = torch.where(better, lost, least)
                best = _Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
        return quantize(weight, best.scale.squeeze(-1), best.zero.squeeze(-1), form)

    def _descent(self, groups: Tensor, grid: _Grid, form: Integer, unit: Tensor) -> Iterator[_Grid]:
        """The grid to begin from and that of every iteration."""
        beta = self.options.beta
        yield grid
        for _ in range(self.options.iterations):
            codes, value = _round(groups, grid, form)
            outliers = shrink((groups - value) / unit, beta, self.options.norm) * unit
            grid = _fitted(groups - outliers, codes, grid, form)
            yield grid
            beta *= self.options.growth


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of every group, both [out, groups, 1]."""

    scale: Tensor
    zero: Tensor


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """Generalized soft thresholding: about argmin over e of |e|^p + beta / 2 (x - e)^2, elementwise.

    One step of the fixed point that Chartrand gives (IEEE ISBI 2009): sign(x) max(|x| - |x|^(p-1) / beta, 0).
    """
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12).pow(norm - 1) / beta).clamp(min=0)


def _round(groups: Tensor, grid: _Grid, form: Integer) -> tuple[Tensor, Tensor]:
    """Codes and values [out, groups, columns of a group]."""
    codes = form.round(groups, grid.scale, grid.zero)
    return codes, form.value(codes, grid.scale, grid.zero)


def _lost(groups: Tensor, grid: _Grid, form: Integer, unit: Tensor, norm: float) -> Tensor:
    """Sum of |error|^p [out, groups, 1], in steps of the grid that a group began from."""
    return ((_round(groups, grid, form)[1] - groups) / unit).abs().pow(norm).sum(-1, keepdim=True)


def _fitted(target: Tensor, codes: Tensor, grid: _Grid, form: Integer) -> _Grid:
    """The grid of least squared distance from codes to targets [out, groups, columns]: the zero, then the scale."""
    zero = grid.zero
    if not form.symmetric:
        top = 2 ** (form.bits - 1)
        zero = (codes - target / grid.scale).mean(-1, keepdim=True).round().clamp(-top, top - 1)
    steps = codes - zero
    scale = (steps * target).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
    scale = scale.to(form.scale_dtype).float()
    usable = torch.isfinite(scale) & (scale > 0)  # a group of zeros fits any scale
    return _Grid(torch.where(usable, scale, grid.scale), zero)
