"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, and let later columns make up for each error.

With H = X^T X over the calibration inputs of a layer and U the upper Cholesky factor of H^-1, rounding column i leaves
an error e = (w_i - q_i) / U_ii, and subtracting e * U_i,j from every later column j is the least-squares repair.
Groups keep their place when columns are processed in another order (`act_order`), so no index is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...errors import NumericalError
from ...formats import Codes, Format
from ..method import Needs, QuantizeOptions, Quantizer
from .grid import grid_of, round_column

BLOCK = 128
"""Columns repaired one by one before the rest of the matrix is repaired by one matrix product."""
PANEL = 256
"""Rows or columns of a square matrix that are copied or inverted at a time."""
MAX_DAMPING = 10.0


class GPTQOptions(QuantizeOptions):
    clip: Literal["none", "mse"] = Field(
        default="mse", description="mse: shrink each group's range to the least squared error"
    )
    act_order: bool = Field(default=True, description="process columns by falling importance (the Hessian's diagonal)")
    damping: float = Field(default=0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")


class GPTQ(Quantizer):
    """Second-order rounding; damping raises itself tenfold until the Hessian can be factorized."""

    name = "gptq"
    needs = Needs.HESSIAN
    Options = GPTQOptions
    options: GPTQOptions

    @property
    def ends(self) -> GPTQ:
        """Itself."""
        return self

    def quantize(self, weight: Tensor, form: Format, hessian: Tensor | None, gradient: Tensor | None = None) -> Codes:
        """Codes of a float32 weight [out, in], repaired by `hessian` [in, in] (arXiv 2210.17323, algorithm 1).

        Raises ShapeMismatch if groups do not divide `in`, NumericalError if no damping makes the Hessian invertible
        or the weights overflow their grid.
        """
        assert hessian is not None
        diagonal = hessian.diagonal().clone()
        unused = diagonal == 0
        if unused.any():
            weight = weight.masked_fill(unused, 0.0)  # a column that is never used may as well be zero
        # Groups whose range may follow the repaired weights are fitted when reached; with act_order they are
        # entered in any order, so all are fitted before.
        order = diagonal.argsort(descending=True) if self.options.act_order else torch.arange(len(diagonal))
        factor = inverse_factor(hessian, order, self.options.damping)
        scale, zero = grid_of(weight, form, self.options.clip, diagonal if self.options.clip == "mse" else None)
        return _round_columns(
            weight, form, factor, order, scale, zero, None if self.options.act_order else self.options.clip, diagonal
        )


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor [in, in] of the inverse of the damped Hessian [in, in], its columns taken in `order` [in].

    `damping` is a share of the mean diagonal, raised tenfold as long as the factorization fails. Raises NumericalError
    if the Hessian is zero or not finite, or no damping helps (arXiv 2210.17323, section 3.3, step 3).
    """
    mean = float(hessian.diagonal().mean())
    if not mean > 0 or mean == float("inf"):
        raise NumericalError(f"the calibration inputs of this layer are all zero or not finite (mean square {mean})")
    # With the columns in reverse, H = L L^T gives U = L^-1 in reverse: one factorization and one triangular inverse,
    # and no inverse of H. The matrices of the largest layer are most of the memory that GPTQ takes: all is done in one.
    reverse = order.flip(0)
    while damping <= MAX_DAMPING:
        lower = _cholesky(hessian, reverse, damping * mean)
        if lower is not None:
            _invert_lower(lower)
            if torch.isfinite(lower.sum()):
                _turn(lower)
                return lower
        del lower
        damping *= 10
    raise NumericalError(f"no damping up to {MAX_DAMPING} makes this layer's Hessian {tuple(hessian.shape)} invertible")


def _cholesky(hessian: Tensor, order: Tensor, added: float) -> Tensor | None:
    """Lower Cholesky factor [in, in] of the Hessian in this order with `added` on its diagonal; None if it has none."""
    damped = torch.empty_like(hessian)
    for start in range(0, len(order), PANEL):
        rows = order[start : start + PANEL]
        damped[start : start + PANEL] = hessian[rows].index_select(1, order)
    diagonal = damped.diagonal()
    unused = diagonal == 0
    diagonal += added
    diagonal[unused] = 1.0  # columns that are never used stand alone: any positive number will do
    lower = damped.mT  # symmetric, so this is the same matrix, laid out as LAPACK factorizes it in place
    _, failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32)))
    return None if failed else lower


def _invert_lower(lower: Tensor) -> None:
    """Put L^-1 in the place of a lower triangular L [n, n], from its last block column to its first."""
    for start in reversed(range(0, len(lower), PANEL)):
        stop = min(start + PANEL, len(lower))
        corner, below = lower[start:stop, start:stop], lower[stop:, start:stop]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(stop - start), upper=False)
        below.copy_(lower[stop:, stop:] @ (below @ inverse)).neg_()
        corner.copy_(inverse)


def _turn(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a matrix [n, n] in its own place."""
    half = len(matrix) // 2
    for start in range(0, half, PANEL):
        stop = min(start + PANEL, half)
        upper, lower = matrix[start:stop], matrix[len(matrix) - stop : len(matrix) - start]
        kept = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(kept)
    if len(matrix) % 2:
        matrix[half] = matrix[half].flip(0)


def _round_columns(
    weight: Tensor,
    form: Format,
    factor: Tensor,
    order: Tensor,
    scale: Tensor,
    zero: Tensor,
    refit: str | None,
    importance: Tensor,
) -> Codes:
    """The GPTQ loop: weight [out, in], factor [in, in] in processing order; `refit`: clip mode of groups on entry."""
    columns = weight.shape[1]
    group_size = columns // scale.shape[1]
    work = weight[:, order].T.contiguous()  # [in, out]: a column of the weight is a contiguous row
    zeros = form.zeros(work)  # repairs pass them by
    scale_t, zero_t = scale.T.contiguous(), zero.T.contiguous()
    codes = torch.empty(columns, weight.shape[0], dtype=form.code_dtype)
    group_of = (order // group_size).tolist()
    for start, stop in _blocks(columns, columns if refit is None else group_size):
        errors = torch.empty(stop - start, weight.shape[0])
        local = work[start:stop]
        for i in range(start, stop):
            group = group_of[i]
            if refit is not None and i % group_size == 0:
                _refit_group(work, form, scale_t, zero_t, i, group_size, refit, importance)
            row = local[i - start]
            kept = row if zeros is None else row.masked_fill(zeros[i], 0.0)
            code, value = round_column(kept, scale_t[group], zero_t[group], form)
            codes[i] = code
            error = torch.sub(row, value, out=errors[i - start]).div_(factor[i, i])
            local[i - start + 1 :].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return form.assemble(restored.T.contiguous(), scale_t.T.contiguous(), zero_t.T.contiguous())


def _blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of blocks of at most BLOCK columns; a group lies in one of them, or begins with one.

    Repairs reach the columns after a block only at its end: a group that began amid a block and went on behind it would
    be fitted to weights that are not repaired yet.
    """
    whole = group_size * max(1, BLOCK // group_size)
    for first in range(0, columns, whole):
        last = min(first + whole, columns)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


def _refit_group(
    work: Tensor, form: Format, scale_t: Tensor, zero_t: Tensor, start: int, size: int, clip: str, importance: Tensor
) -> None:
    """Fit one group's grid to its weights as the repairs so far have left them (columns in their natural order)."""
    group = work[start : start + size].T.contiguous()
    s, z = grid_of(group, form, clip, importance[start : start + size] if clip == "mse" else None, groups=1)
    scale_t[start // size], zero_t[start // size] = s[:, 0], z[:, 0]
