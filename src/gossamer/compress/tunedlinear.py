"""A linear layer whose weight is computed from codes in every forward pass: a gradient reaches what scales them.

Knows one weight and its format; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CompressionError, NumericalError
from ..formats import Codes, Format, Integer
from .fakequant import codes_of_steps, round_steps, stored_grid, straight_through
from .floatweight import FloatWeight

CELL = 0.49
"""How far from its code, in steps, a weight may start: just inside of what rounds to it."""


class TunedLinear(nn.Module):
    """x [.., in] -> [.., out], by codes, by stored floats, or by a float weight that stays as it is."""

    def __init__(
        self, name: str, form: Format | None, weight: Codes | FloatWeight | Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.name = name
        self.form = None if form is None else form.grid
        """None: a float weight."""
        self._stored_as = form
        self._pruned: Tensor | None = None
        """Where the weight stays zero, whatever is trained."""
        self.extra: nn.Module | None = None
        """What is added to the layer's output, such as a low-rank adapter: x [.., in] -> [.., out]."""
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale: nn.Parameter | None = None
        self.zero: nn.Parameter | None = None
        self.levels: nn.Parameter | None = None
        self.latent: nn.Parameter | None = None
        """[out, in] the weights behind the codes in units of their scale, if they are trained."""
        self.stored_floats: FloatWeight | None = None
        if isinstance(weight, Tensor):
            self._dense: Tensor | None = weight
            return
        if isinstance(weight, FloatWeight):
            self._dense, self.stored_floats = None, weight
            return
        self._dense, self._codes = None, weight
        self._pruned = None if form is None else form.zeros(weight.dequantize())
        if weight.levels is not None and weight.levels.ndim == 2:  # a row's own levels are what is stored, not a scale
            self.levels = nn.Parameter(weight.levels.float(), requires_grad=False)
        else:
            self.scale = nn.Parameter(weight.scale.float().clone(), requires_grad=False)
        if weight.zero is not None:
            self.zero = nn.Parameter(weight.zero.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight(), self.bias)
        return y if self.extra is None else y + self.extra(x)

    def trainable(self, scales: bool, zeros: bool) -> Iterator[nn.Parameter]:
        """Those of the layer's parameters that may be trained."""
        chosen = (scales and self.scale, scales and self.levels, zeros and self.zero, self.latent)
        yield from (parameter for parameter in chosen if isinstance(parameter, nn.Parameter))

    def weight(self) -> Tensor:
        """The float32 weight [out, in] as it would be stored now, differentiable by what is trainable."""
        if self._dense is not None:
            return self._dense
        if self.stored_floats is not None:
            return cast(Tensor, self.stored_floats())
        if self.latent is not None:
            weight = self._rounded(self.latent)
        elif self.levels is not None:
            index = self._codes.codes.long()
            weight = (self._levels().gather(1, index).view(*self._codes.scale.shape, -1) * self._scales()).flatten(1)
        else:
            weight = (self._steps(self._codes.codes) * self._scales()).flatten(1)
        if self._pruned is not None:
            weight = weight.masked_fill(self._pruned, 0.0)
        return self._with_outliers(weight)

    def look_up(self, tokens: Tensor) -> Tensor:
        """Rows [.., in] of the weight [out, in] for tokens [..]: what an embedding gives."""
        if self._dense is not None:
            return F.embedding(tokens, self._dense)
        if self.stored_floats is not None:
            return F.embedding(tokens, self.stored_floats())
        rows = tokens.flatten()
        if self.latent is not None:
            return self._rounded(self.latent, rows).view(*tokens.shape, -1)
        weight = self._steps(self._codes.codes, rows) * self._scales()[rows]
        return weight.view(*tokens.shape, -1)

    @torch.no_grad()
    def begin_latent(self, weight: Tensor | None) -> None:
        """Train the weights behind the codes, begun at `weight` [out, in] or, without one, at what the codes stand for.

        A weight begins where it rounds to its code, as near to where it was as that allows. On a codebook, whose cells
        are of many sizes, one outside of its cell begins at what its code stands for.
        """
        if self.form is None or self.levels is not None or self.stored_floats is not None:
            raise CompressionError(f"{self.name}: weights of a model in training can only be rounded to a scaled grid")
        start = self._steps(self._codes.codes).clone()
        if weight is not None:
            wanted = self._without_outliers(weight).view_as(start) / self._scales()
            if isinstance(self.form, Integer):
                start += (wanted - start).clamp_(-CELL, CELL)
            else:
                stays = self._codes_behind(wanted.flatten(1)) == self._codes.codes
                start = torch.where(stays.view_as(start), wanted, start)
        self.latent = nn.Parameter(start.flatten(1), requires_grad=False)

    def stored(self) -> dict[str, Tensor]:
        """Tensors to be stored now, by their local names. Raises NumericalError if the weight is not finite."""
        if self.stored_floats is not None:
            return self.stored_floats.stored()
        assert self._stored_as is not None
        return self._stored_as.pack(self.codes())

    @torch.no_grad()
    def codes(self) -> Codes:
        """What is to be stored now. Raises NumericalError if the weight is not finite."""
        if not torch.isfinite(self.weight()).all():
            raise NumericalError(
                f"{self.name}: the weight is not finite after training", hint="take a lower learning rate"
            )
        codes = self._with_codes(self._codes.codes if self.latent is None else self._codes_behind(self.latent))
        return codes.with_zeros(self._pruned)

    def _with_codes(self, codes: Tensor) -> Codes:
        zero = self._zeros()
        return Codes(
            codes,
            self._scales().detach().squeeze(-1),
            None if zero is None else zero.detach().squeeze(-1).to(torch.int8),
            self._codes.levels if self.levels is None else self._levels().detach(),
            self._codes.outliers,
        )

    def _nearest(self, weight: Tensor) -> Tensor:
        """Codes [out, in] of the grid's points nearest to a weight [out, in]."""
        assert self.form is not None
        scale = self._scales().detach()
        codes = self.form.round(weight.view(*scale.shape[:2], -1), scale, self._zeros())
        return codes.to(self._codes.codes.dtype).flatten(1)

    def _codes_behind(self, latent: Tensor) -> Tensor:
        """Codes [out, in] of the grid's points nearest to a latent weight [out, in]."""
        if isinstance(self.form, Integer):
            assert self.scale is not None
            return codes_of_steps(latent, self.scale, self.zero, self.form).codes
        return self._nearest((latent.view(*self._codes.scale.shape, -1) * self._scales().detach()).flatten(1))

    def _rounded(self, latent: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Rows of the grid's points nearest to a latent weight [out, in]; the gradient passes where none is clipped."""
        if isinstance(self.form, Integer):
            assert self.scale is not None
            zero = None if self.zero is None else self.zero[rows]
            return round_steps(latent[rows], self.scale[rows], zero, self.form)
        assert self._codes.levels is not None
        grouped, finite = latent.view(*self._codes.scale.shape, -1), self._codes.levels.float()
        finite = finite[finite.isfinite()]
        with torch.no_grad():
            steps = self._steps(self._codes_behind(latent))
            inside = (grouped >= finite.min()) & (grouped <= finite.max())
        through = torch.where(inside, straight_through(grouped, steps), steps)
        return (through * self._scales()).flatten(1)[rows]

    def _steps(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        """What codes [out, in] (or these rows of them) stand for in units of their scale: [out, groups, columns]."""
        grouped = codes.view(*self._codes.scale.shape, -1)
        grouped = grouped if rows is None else grouped[rows]
        if self._codes.levels is not None:
            return self._codes.levels.float()[grouped.long()]
        zero = self._zeros()
        if zero is None:
            return grouped.float()
        return grouped.float() - (zero if rows is None else zero[rows])

    def _scales(self) -> Tensor:
        """Scales [out, groups, 1] as they are stored, with a gradient as if they were not rounded."""
        if self.scale is None:
            return self._codes.scale.float().unsqueeze(-1)
        if isinstance(self.form, Integer):
            return stored_grid(self.scale, None, self.form)[0].unsqueeze(-1)
        return straight_through(self.scale, _as_stored(self.form, self.scale.detach())).unsqueeze(-1)

    def _levels(self) -> Tensor:
        """A row's own levels [out, levels] as they are stored, with a gradient as if they were not rounded."""
        assert self.levels is not None
        assert self.form is not None
        stored = self.levels.detach().to(self.form.scale_dtype).float()
        return straight_through(self.levels, stored)

    def _zeros(self) -> Tensor | None:
        """Zero points [out, groups, 1], rounded to the range of the codes, with a gradient as if they were not."""
        if self.zero is None or self.scale is None:
            return None
        assert isinstance(self.form, Integer)
        return stored_grid(self.scale, self.zero, self.form)[1].unsqueeze(-1)

    def _with_outliers(self, weight: Tensor) -> Tensor:
        outliers = self._codes.outliers
        if outliers is None:
            return weight
        return weight.index_put((outliers.rows.long(), outliers.columns.long()), outliers.values, accumulate=True)

    def _without_outliers(self, weight: Tensor) -> Tensor:
        """What is left of a float weight [out, in] for the grid to stand for."""
        outliers = self._codes.outliers
        if outliers is None:
            return weight
        return weight.index_put((outliers.rows.long(), outliers.columns.long()), -outliers.values, accumulate=True)


def _as_stored(form: Format | None, scale: Tensor) -> Tensor:
    """Scales of a codebook as the format stores them, never zero: a grid of one point would end a training."""
    assert form is not None
    high = scale.clamp(min=4 * torch.finfo(torch.float32).smallest_normal) * form.reach
    return form.fit(torch.zeros_like(high), high)[0]
