"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, and let later columns make up for each error.

With H = X^T X over the calibration inputs of a layer and U the upper Cholesky factor of H^-1, rounding column i leaves
an error e = (w_i - q_i) / U_ii, and subtracting e * U_i,j from every later column j is the least-squares repair.
Groups keep their place when columns are processed in another order (`act_order`), so no index is stored.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...errors import NumericalError
from ...formats import Codes, Integer
from ..method import Needs, QuantizeOptions, Quantizer
from .grid import grid_of, round_column

BLOCK = 128
"""Columns repaired one by one before the rest of the matrix is repaired by one matrix product."""
MAX_DAMPING = 10.0


class GPTQOptions(QuantizeOptions):
    clip: Literal["none", "mse"] = Field("mse", description="mse: shrink each group's range to the least squared error")
    act_order: bool = Field(True, description="process columns by falling importance (the Hessian's diagonal)")
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")


class GPTQ(Quantizer):
    """Second-order rounding; damping raises itself tenfold until the Hessian can be factorized."""

    name = "gptq"
    needs = Needs.HESSIAN
    Options = GPTQOptions
    options: GPTQOptions

    def quantize(self, weight: Tensor, form: Integer, hessian: Tensor | None) -> Codes:
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
    """Upper Cholesky factor [in, in] of the inverse of the damped, reordered Hessian. Raises NumericalError."""
    mean = float(hessian.diagonal().mean())
    if not mean > 0 or mean == float("inf"):
        raise NumericalError(f"the calibration inputs of this layer are all zero or not finite (mean square {mean})")
    # With the columns in reverse, H = L L^T gives U = L^-1 in reverse: one factorization and one triangular inverse,
    # and no inverse of H. The matrices of the largest layer are most of the memory that GPTQ takes: drop each early.
    reverse = order.flip(0)
    while damping <= MAX_DAMPING:
        damped = torch.empty_like(hessian)
        for start in range(0, len(reverse), BLOCK):
            rows = reverse[start : start + BLOCK]
            damped[start : start + BLOCK] = hessian[rows].index_select(1, reverse)
        diagonal = damped.diagonal()
        diagonal += damping * mean
        diagonal[diagonal == damping * mean] = mean  # unused columns: any positive number will do
        lower = damped.mT  # symmetric, so this is the same matrix, laid out as LAPACK factorizes it in place
        _, failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32)))
        if not failed:
            inverse = torch.eye(len(order))
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower, damped, diagonal
            if torch.isfinite(inverse.sum()):
                return inverse.flip(0, 1)
        damping *= 10
    raise NumericalError(f"no damping up to {MAX_DAMPING} makes this layer's Hessian {tuple(hessian.shape)} invertible")


def _round_columns(
    weight: Tensor,
    form: Integer,
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
    scale_t, zero_t = scale.T.contiguous(), zero.T.contiguous()
    codes = torch.empty(columns, weight.shape[0], dtype=torch.int8)
    group_of = (order // group_size).tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(stop - start, weight.shape[0])
        local = work[start:stop]
        for i in range(start, stop):
            group = group_of[i]
            if refit is not None and i % group_size == 0:
                _refit_group(work, form, scale_t, zero_t, i, group_size, refit, importance)
            row = local[i - start]
            code, value = round_column(row, scale_t[group], zero_t[group], form)
            codes[i] = code
            error = torch.sub(row, value, out=errors[i - start]).div_(factor[i, i])
            local[i - start + 1 :].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return Codes(restored.T.contiguous(), scale_t.T.contiguous(), None if form.symmetric else zero_t.T.to(torch.int8))


def _refit_group(
    work: Tensor, form: Integer, scale_t: Tensor, zero_t: Tensor, start: int, size: int, clip: str, importance: Tensor
) -> None:
    """Fit one group's grid to its weights as the repairs so far have left them (columns in their natural order)."""
    group = work[start : start + size].T.contiguous()
    channel = Integer(form.bits, None, form.symmetric, form.scale_dtype)
    s, z = grid_of(group, channel, clip, importance[start : start + size] if clip == "mse" else None)
    scale_t[start // size], zero_t[start // size] = s[:, 0], z[:, 0]
