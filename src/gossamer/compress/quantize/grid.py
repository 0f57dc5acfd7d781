"""The integer grid of one group of weights: its scale, its zero point, and the rounding to it.

Shared by every method that stores `formats.Integer`. Scales are rounded to the stored dtype *before* any weight is,
so that the codes are chosen for exactly the grid that a reader will see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Codes, Integer

CLIP_STEPS = 24
WEIGHTS_AT_ONCE = 1 << 20
"""Bounds the temporary memory of the search, and keeps it in the caches."""
SMALLEST_RANGE = 0.45
"""The search tries CLIP_STEPS ranges, from one that clips nothing down to this share of a group's own."""


def grid_of(
    weight: Tensor, form: Integer, clip: str = "none", importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out, groups] of a weight [out, in]; with clip="mse" the range of least squared error.

    `importance` [in] weighs the squared error of each column (the diagonal of the Hessian, say).
    Zero points are int8 in the range of the codes, and 0 for a symmetric format.
    """
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    parts = [_grid_of_rows(part, form, clip, importance) for part in torch.split(weight, rows)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, form: Integer) -> Codes:
    """Round a weight [out, in] to the nearest point of its groups' grids."""
    grouped = weight.view(*scale.shape, -1)
    codes, _ = _round(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), form)
    return Codes(codes.to(torch.int8).view(weight.shape), scale, None if form.symmetric else zero.to(torch.int8))


def round_column(column: Tensor, scale: Tensor, zero: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    """Codes and their values for one column [out] with its group's scale and zero point [out]."""
    return _round(column, scale, zero, form)


def _grid_of_rows(weight: Tensor, form: Integer, clip: str, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    grouped = weight.view(weight.shape[0], form.groups(weight.shape[1]), -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = _scale_zero(low, high, form)
    if clip == "none":
        return scale, zero
    weights = None if importance is None else importance.view(1, grouped.shape[1], -1)
    best = torch.full_like(low, torch.inf)
    # A symmetric grid whose steps cover the range evenly clips the largest weight by half a step: begin above it.
    widest = (2**form.bits - 1) / (2**form.bits - 2) if form.symmetric else 1.0
    for step in range(CLIP_STEPS):
        shrink = widest + (SMALLEST_RANGE - widest) * step / (CLIP_STEPS - 1)
        s, z = _scale_zero(low * shrink, high * shrink, form)
        error = (_round(grouped, s.unsqueeze(-1), z.unsqueeze(-1), form)[1] - grouped).square_()
        loss = (error if weights is None else error.mul_(weights)).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _scale_zero(low: Tensor, high: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    if form.symmetric:
        # 2^bits - 1 steps over twice the largest weight: all codes are used, and only the largest is clipped.
        scale = torch.maximum(high, -low).clamp(min=0) / ((2**form.bits - 1) / 2)
        zero = torch.zeros_like(scale)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (2**form.bits - 1)
        zero = torch.zeros_like(scale)
    # A group of zeros still needs a scale to divide by.
    scale = torch.where(scale > 0, scale, 1.0).to(form.scale_dtype).float()
    if not form.symmetric:
        zero = (-(2 ** (form.bits - 1)) - low / scale).round().clamp(*_range(form))
    return scale, zero


def _round(weight: Tensor, scale: Tensor, zero: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    codes = (weight / scale + zero).round_().clamp_(*_range(form))
    return codes, (codes - zero) * scale


def _range(form: Integer) -> tuple[int, int]:
    return -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
