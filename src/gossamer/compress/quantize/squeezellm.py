"""SqueezeLLM (Kim et al., arXiv 2306.07629): levels of its own for each row, placed where the loss feels rounding most.

The 2^bits levels of a row minimize sum_i s_i (w_i - level)^2 (weighted k-means), where s_i is the mean squared gradient
of the loss by w_i, or the mean square of the layer's input i where no gradients were taken. A small share of the
weights is kept beside the levels: the most sensitive ones, and those farthest from zero.

Beyond the paper, `repair` rounds column by column as GPTQ does (arXiv 2210.17323), to the row's own levels.
"""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import NumericalError
from ...formats import Codes, Format, KMeans, Outliers
from ..method import GridOptions, Needs, QuantizeOptions, Quantizer
from .gptq import inverse_factor

WEIGHTS_AT_ONCE = 1 << 20
"""Bounds the temporary memory of the search for levels."""
CUTS = 8
"""Pieces for each level that a row is cut into before the best bounds are sought among the cuts."""
INTERVALS_AT_ONCE = 1 << 22
"""Bounds the temporary memory of that."""
MAX_ROUNDS = 100
"""Of Lloyd's algorithm; rows converge after some tens."""
REPAIR_AT_ONCE = 128
"""Columns repaired one by one before the rest of the matrix is repaired by one matrix product."""


class SqueezeLLMOptions(QuantizeOptions):
    bits: int = Field(4, ge=2, le=4, description="bits per weight: 2, 3 or 4; a row has 2^bits levels of its own")
    outlier_share: float = Field(0.0045, ge=0, le=0.1, description="share of the weights kept beside the levels")
    sensitive_share: float = Field(
        0.0005, ge=0, le=0.1, description="of all weights, the share kept for its sensitivity; the rest for its size"
    )
    repair: bool = Field(False, description="round column by column and let later columns make up for each error")
    damping: float = Field(0.01, gt=0, le=1, description="of `repair`: share of the mean diagonal added to the Hessian")

    @model_validator(mode="after")
    def _only_what_applies(self) -> Self:
        grids: list[GridOptions] = [self, *self.layers.values()]
        for grid in grids:
            for name in ("format", "group_size", "symmetric", "double_quant"):
                if getattr(grid, name) != GridOptions.model_fields[name].default:
                    raise ValueError(f"{name} does not apply to squeezellm: every row has levels of its own")
            if grid.bits > 4:
                raise ValueError(f"bits is {grid.bits}: squeezellm takes 2, 3 or 4")
        if self.budget is not None:
            raise ValueError("budget does not apply to squeezellm: give `layers` their bits yourself")
        if self.clip != "none":
            raise ValueError("clip does not apply to squeezellm: k-means places the outermost levels, too")
        if self.sensitive_share > self.outlier_share:
            raise ValueError(f"sensitive_share {self.sensitive_share} is over outlier_share {self.outlier_share}")
        return self

    def layer_format(self, grid: GridOptions, columns: list[int]) -> Format:
        """Levels for each row, whatever the row lengths."""
        return KMeans(grid.bits, self.outlier_share)


class SqueezeLLM(Quantizer):
    """Sensitivity-weighted k-means of each row, sparse outliers kept."""

    name = "squeezellm"
    needs = Needs.GRADIENT
    Options = SqueezeLLMOptions
    options: SqueezeLLMOptions

    def quantize(self, weight: Tensor, form: Format, hessian: Tensor | None, gradient: Tensor | None = None) -> Codes:
        """Codes of a float32 weight [out, in]; `gradient` [out, in] is the mean squared gradient of the loss.

        Without it the diagonal of `hessian` [in, in] stands for it in every row. Raises NumericalError if what is used
        is not finite, or if `repair` finds no damping that makes the Hessian invertible.
        """
        assert isinstance(form, KMeans)
        assert hessian is not None
        sensitivity = hessian.diagonal().expand_as(weight) if gradient is None else gradient
        if not torch.isfinite(sensitivity).all():
            raise NumericalError("the squared gradients of this layer are not finite", hint="the checkpoint is damaged")
        kept = kept_beside(weight, sensitivity, self.options.outlier_share, self.options.sensitive_share)
        levels = row_levels(weight, sensitivity.masked_fill(kept, 0.0), 2**form.bits)
        target = _repaired(weight, levels, kept, hessian, self.options.damping) if self.options.repair else weight
        codes = nearest(target, levels)
        rows, columns = kept.nonzero(as_tuple=True)
        left = (target - levels.gather(1, codes))[kept].bfloat16().float()
        beside = Outliers(rows.to(torch.int32), columns.to(torch.int32), left)
        return Codes(codes.to(torch.int8), torch.ones(len(weight), 1), None, levels, beside)


def kept_beside(weight: Tensor, sensitivity: Tensor, share: float, sensitive_share: float) -> Tensor:
    """Which weights [out, in] are kept beside the levels, as a mask: so many of every row.

    The most sensitive ones, then the largest of the others. Rows are treated alike so that the layers that are
    quantized as one can be taken apart again.
    """
    columns = weight.shape[1]
    count, sensitive = round(share * columns), round(sensitive_share * columns)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept.scatter_(1, sensitivity.topk(sensitive, dim=1).indices, True)
    largest = weight.abs().masked_fill(kept, -1.0).topk(count - sensitive, dim=1).indices
    return kept.scatter_(1, largest, True)


def row_levels(weight: Tensor, importance: Tensor, count: int) -> Tensor:
    """Rising levels [out, count], as float16 holds them, of least weighted squared error in each row.

    `weight` and `importance` are [out, in]; a row without any importance counts all its weights alike. Raises
    NumericalError if a level overflows float16.
    """
    step = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    parts = zip(torch.split(weight, step), torch.split(importance, step), strict=True)
    levels = torch.cat([kmeans(w.double(), s.double(), count) for w, s in parts]).half().float()
    if not torch.isfinite(levels).all():
        raise NumericalError(
            f"weights from {float(weight.min()):.3g} to {float(weight.max()):.3g} overflow levels of float16",
            hint="no trained model has such weights: compare the checkpoint with its source",
        )
    return levels


def kmeans(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Rising centres float64 [rows, count] of weighted k-means in one dimension: values and weights float64 [rows, n].

    Clusters of a line are intervals, so the best ones can be found by dynamic programming: exactly for rows of up to
    CUTS * count values. Longer rows are cut beforehand into so many pieces, none of which is cut by the programming;
    Lloyd's algorithm then moves the bounds to where they belong, by a binary search for each centre and round.
    """
    values, order = values.sort(dim=1)
    weights = weights.gather(1, order)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    weights = weights / weights.mean(1, keepdim=True) + 1e-9  # a weight that nothing rests on still has a nearest level
    middle = (weights * values).mean(1, keepdim=True) / weights.mean(1, keepdim=True)
    values = values - middle  # so that differences of squares lose no digits
    sums = _Sums(values, weights)
    cuts = _cuts(values, weights, CUTS * count)
    at_once = max(1, INTERVALS_AT_ONCE // cuts.shape[1] ** 2)
    parts = [_best_bounds(sums.rows(i, at_once), cuts[i : i + at_once], count) for i in range(0, len(values), at_once)]
    return _lloyd(values, sums, torch.cat(parts)) + middle


class _Sums:
    """Running sums [rows, n + 1] of the weights and of weight times value, of rows in rising order."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        nothing = torch.zeros(len(values), 1, dtype=values.dtype)
        self.weight = torch.cat([nothing, weights.cumsum(1)], 1)
        self.moment = torch.cat([nothing, (weights * values).cumsum(1)], 1)

    def between(self, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and moment [rows, count] of what lies between bounds [rows, count + 1]."""
        return self.weight.gather(1, bounds).diff(dim=1), self.moment.gather(1, bounds).diff(dim=1)

    def rows(self, start: int, count: int) -> _Sums:
        """Of these rows alone."""
        part = copy(self)
        part.weight, part.moment = self.weight[start : start + count], self.moment[start : start + count]
        return part


def _cuts(values: Tensor, weights: Tensor, pieces: int) -> Tensor:
    """Where sorted rows [rows, n] are cut into pieces: indices [rows, cuts] from 0 to n, each between two values.

    Few values are all cut apart. Else half of the pieces go where the best levels lie dense: as the cube root of
    density times weight (Panter and Dite), which is a step of (weight * gap^2)^(1/3) from each value to the next. The
    rest follow weight, and number.
    """
    rows, n = values.shape
    if n <= pieces:
        return torch.arange(n + 1).expand(rows, n + 1)
    gaps = torch.nn.functional.pad(values.diff(dim=1), (1, 0))
    dense = (weights * gaps.square()).pow(1 / 3)
    dense = dense / dense.mean(1, keepdim=True).clamp(min=1e-300)
    steps = (0.5 * dense + 0.25 * weights + 0.25).cumsum(1)
    inner = torch.searchsorted(steps, steps[:, -1:] * (torch.arange(1, pieces, dtype=steps.dtype) / pieces))
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0), value=0), (0, 1), value=n)


def _best_bounds(sums: _Sums, cuts: Tensor, count: int) -> Tensor:
    """Bounds [rows, count + 1] among `cuts` [rows, cuts] between which `count` centres cost least."""
    weight, moment = sums.weight.gather(1, cuts), sums.moment.gather(1, cuts)
    w, m = (t[:, None, :] - t[:, :, None] for t in (weight, moment))  # [rows, from, to]
    # Of sum w (v - mean)^2 only -moment^2 / weight depends on the bounds; intervals that run backwards cost everything.
    cost = torch.where(w > 0, -m.square() / w.clamp(min=1e-300), 0.0).float()
    cost.masked_fill_(torch.ones(cost.shape[1:], dtype=torch.bool).tril(-1), torch.inf)
    least, came_from = cost[:, 0], []
    for _ in range(count - 1):
        least, origin = (least[:, :, None] + cost).min(1)
        came_from.append(origin)
    at = torch.full((len(cuts), 1), cuts.shape[1] - 1)
    found = [cuts.gather(1, at)]
    for origin in reversed(came_from):
        at = origin.gather(1, at)
        found.append(cuts.gather(1, at))
    found.append(torch.zeros_like(at))
    return torch.cat(found[::-1], 1)


def _lloyd(values: Tensor, sums: _Sums, bounds: Tensor) -> Tensor:
    """Centres [rows, count] at which Lloyd's algorithm comes to rest from these bounds [rows, count + 1]."""
    centres = values.gather(1, bounds[:, :-1].clamp(max=values.shape[1] - 1))
    for _ in range(MAX_ROUNDS):
        weight, moment = sums.between(bounds)
        # A centre that has no values keeps its place between its neighbours.
        centres = torch.where(weight > 0, moment / weight.clamp(min=1e-300), centres)
        middles = (centres[:, 1:] + centres[:, :-1]) / 2
        found = torch.cat([bounds[:, :1], torch.searchsorted(values, middles.contiguous()), bounds[:, -1:]], 1)
        if torch.equal(found, bounds):
            break
        bounds = found
    return centres


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index int64 [out, in] of the level nearest to each value [out, in]; levels [out, count] rise."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous())


def _repaired(weight: Tensor, levels: Tensor, kept: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The weight [out, in] with the repairs that GPTQ makes on the way; each one's nearest level is its code.

    A weight that is kept beside the levels leaves no error, so nothing has to make up for it.
    """
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(hessian, order, damping)
    work, kept = weight[:, order].T.contiguous(), kept[:, order].T.contiguous()  # a column of the weight is a row
    columns = len(work)
    for start in range(0, columns, REPAIR_AT_ONCE):
        stop = min(start + REPAIR_AT_ONCE, columns)
        errors = torch.empty(stop - start, work.shape[1])
        for i in range(start, stop):
            value = levels.gather(1, nearest(work[i, :, None], levels))[:, 0]
            errors[i - start] = ((work[i] - value) / factor[i, i]).masked_fill_(kept[i], 0.0)
            work[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(work)
    restored[order] = work
    return restored.T.contiguous()
