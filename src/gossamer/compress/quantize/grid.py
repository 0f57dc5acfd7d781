"""The grid of one group of weights: its scale, its zero point, and the rounding to it.

Shared by every method that stores a `formats.Format` with a scale per group. Scales are rounded to what is stored
*before* any weight is, so that the codes are chosen for exactly the grid that a reader will see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NumericalError
from ...formats import Codes, Format

WEIGHTS_AT_ONCE = 1 << 20
"""Bounds the temporary memory of the search, and keeps it in the caches."""
FLOAT_MAX = torch.finfo(torch.float32).max


def grid_of(
    weight: Tensor, form: Format, clip: str = "none", importance: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out, groups] of a weight [out, in]; with clip="mse" the range of least squared error.

    `importance` [in] weighs the squared error of each column (the diagonal of the Hessian, say). `groups` of a row are
    as many as the format has, unless given. Both results are float32. Zero points are whole numbers in the range of the
    codes, and 0 for a symmetric format. Raises ShapeMismatch if groups do not divide `in`, NumericalError if a value of
    the grid overflows.
    """
    groups = form.groups(weight.shape[1]) if groups is None else groups
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    parts = [_grid_of_rows(part, form, clip, importance, groups) for part in torch.split(weight, rows)]
    scale, zero = torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])
    _check_range(weight, scale, form)
    return scale, zero


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, form: Format) -> Codes:
    """Codes of a weight [out, in]: the nearest points of its groups' grids, `scale` and `zero` [out, groups]."""
    grouped = weight.view(*scale.shape, -1)
    codes = form.round(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1))
    return form.assemble(codes.view(weight.shape), scale, zero)


def round_column(column: Tensor, scale: Tensor, zero: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Codes (whole float32 numbers) and their values, both [out], of one column [out]; `scale` and `zero` are [out]."""
    codes = form.round(column, scale, zero)
    return codes, form.value(codes, scale, zero)


def _grid_of_rows(
    weight: Tensor, form: Format, clip: str, importance: Tensor | None, groups: int
) -> tuple[Tensor, Tensor]:
    grouped = weight.view(weight.shape[0], groups, -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = form.fit(low, high)
    if clip == "none":
        return scale, zero
    weights = None if importance is None else importance.view(1, grouped.shape[1], -1)
    best = _loss(grouped, scale, zero, form, weights)  # a group keeps its full range unless another loses less
    for share in form.shares:
        s, z = form.fit(low * share, high * share)
        loss = _loss(grouped, s, z, form, weights)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _loss(grouped: Tensor, scale: Tensor, zero: Tensor, form: Format, weights: Tensor | None) -> Tensor:
    """Squared error [out, groups] of rounding weights [out, groups, columns of a group] to these grids."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    error = (form.value(form.round(grouped, scale, zero), scale, zero) - grouped).square_()
    return (error if weights is None else error.mul_(weights)).sum(-1)


def _check_range(weight: Tensor, scale: Tensor, form: Format) -> None:
    """Raises NumericalError if a scale, or a value that a code may stand for, is not finite."""
    # One look at the finished scales: a fraction of a percent of the weights, and nothing beside the search for them.
    largest = float(scale.max())
    if not largest * form.reach <= FLOAT_MAX:
        raise NumericalError(
            f"weights from {float(weight.min()):.3g} to {float(weight.max()):.3g} need a scale of {largest:.3g} as "
            f"{form.name}: its grid overflows {str(form.scale_dtype).removeprefix('torch.')} scales or float32",
            hint="no trained model has such weights: compare the checkpoint with its source",
        )
