"""The integer grid of one group of weights: its scale, its zero point, and the rounding to it.

Shared by every method that stores `formats.Integer`. Scales are rounded to the stored dtype *before* any weight is,
so that the codes are chosen for exactly the grid that a reader will see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NumericalError
from ...formats import Codes, Integer

CLIP_STEPS = 24
WEIGHTS_AT_ONCE = 1 << 20
"""Bounds the temporary memory of the search, and keeps it in the caches."""
SMALLEST_RANGE = 0.45
"""The search tries CLIP_STEPS ranges, from one that clips nothing down to this share of a group's own."""
FLOAT_MAX = torch.finfo(torch.float32).max


def grid_of(
    weight: Tensor, form: Integer, clip: str = "none", importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out, groups] of a weight [out, in]; with clip="mse" the range of least squared error.

    `importance` [in] weighs the squared error of each column (the diagonal of the Hessian, say).
    Both are float32. Zero points are whole numbers in the range of the codes, and 0 for a symmetric format.
    Raises ShapeMismatch if groups do not divide `in`, NumericalError if a value of the grid overflows.
    """
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    parts = [_grid_of_rows(part, form, clip, importance) for part in torch.split(weight, rows)]
    scale, zero = torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])
    _check_range(weight, scale, form)
    return scale, zero


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, form: Integer) -> Codes:
    """Codes of a weight [out, in]: the nearest points of its groups' grids, `scale` and `zero` [out, groups]."""
    grouped = weight.view(*scale.shape, -1)
    codes, _ = _round(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), form)
    return Codes(codes.to(torch.int8).view(weight.shape), scale, None if form.symmetric else zero.to(torch.int8))


def round_column(column: Tensor, scale: Tensor, zero: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    """Codes (whole float32 numbers) and their values, both [out], of one column [out]; `scale` and `zero` are [out]."""
    return _round(column, scale, zero, form)


def _grid_of_rows(weight: Tensor, form: Integer, clip: str, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    grouped = weight.view(weight.shape[0], form.groups(weight.shape[1]), -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = _scale_zero(low, high, form)
    if clip == "none":
        return scale, zero
    weights = None if importance is None else importance.view(1, grouped.shape[1], -1)
    best = _loss(grouped, scale, zero, form, weights)  # a group keeps its full range unless another loses less
    for shrink in _shrinks(form):
        s, z = _scale_zero(low * shrink, high * shrink, form)
        loss = _loss(grouped, s, z, form, weights)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _shrinks(form: Integer) -> list[float]:
    """Shares of a group's own range that the search tries besides the whole of it."""
    # A symmetric grid whose steps cover the range evenly clips the largest weight by half a step: begin above it.
    widest = (2**form.bits - 1) / (2**form.bits - 2) if form.symmetric else 1.0
    shares = [widest + (SMALLEST_RANGE - widest) * step / (CLIP_STEPS - 1) for step in range(CLIP_STEPS)]
    return [share for share in shares if share != 1.0]


def _loss(grouped: Tensor, scale: Tensor, zero: Tensor, form: Integer, weights: Tensor | None) -> Tensor:
    """Squared error [out, groups] of rounding weights [out, groups, columns of a group] to these grids."""
    error = (_round(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), form)[1] - grouped).square_()
    return (error if weights is None else error.mul_(weights)).sum(-1)


def _scale_zero(low: Tensor, high: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    if form.symmetric:
        # 2^bits - 1 steps over twice the largest weight: all codes are used, and only the largest is clipped.
        scale = torch.maximum(high, -low).clamp(min=0) / ((2**form.bits - 1) / 2)
        zero = torch.zeros_like(scale)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (2**form.bits - 1)
        zero = torch.zeros_like(scale)
    scale = scale.to(form.scale_dtype).float()
    scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros still needs a scale to divide by
    if not form.symmetric:
        zero = (-(2 ** (form.bits - 1)) - low / scale).round().clamp(*_range(form))
    return scale, zero


def _check_range(weight: Tensor, scale: Tensor, form: Integer) -> None:
    """Raises NumericalError if a scale, or a value that a code may stand for, is not finite."""
    # One look at the finished scales: a fraction of a percent of the weights, and nothing beside the search for them.
    largest = float(scale.max())
    steps = 2 ** (form.bits - 1) if form.symmetric else 2**form.bits - 1
    if not largest * steps <= FLOAT_MAX:
        raise NumericalError(
            f"weights from {float(weight.min()):.3g} to {float(weight.max()):.3g} need a scale of {largest:.3g} at "
            f"{form.bits} bits: its grid overflows {str(form.scale_dtype).removeprefix('torch.')} scales or float32",
            hint="no trained model has such weights: compare the checkpoint with its source",
        )


def _round(weight: Tensor, scale: Tensor, zero: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    codes = (weight / scale + zero).round_().clamp_(*_range(form))
    return codes, (codes - zero) * scale


def _range(form: Integer) -> tuple[int, int]:
    return -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
