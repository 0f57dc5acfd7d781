"""A weight whose stored form is floats, all of them trainable: dense, low-rank factors, what a fixed mask leaves.

Knows one weight and its format (`Format.in_float`); knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CompressionError, NumericalError
from ..formats import Format


class FloatWeight(nn.Module):
    """A float32 weight [out, in] computed from what its format stores; nothing is trainable until `begin`."""

    def __init__(self, name: str, form: Format, stored: Mapping[str, Tensor]) -> None:
        super().__init__()
        wide = form.in_float
        if wide is None:
            raise CompressionError(
                f"{name} is stored as {form.name}, not in float: its weights cannot be trained as they are",
                hint="train before it is quantized, or take scales, qat or qlora",
            )
        self.name = name
        self._form, self._wide, self._stored = form, wide, dict(stored)
        self.floats = nn.ParameterDict()
        """Local name -> float32 parameter in place of the stored tensor."""

    def forward(self) -> Tensor:
        """The weight as it stands now, differentiable by `floats`."""
        if not self.floats:
            return self._form.unpack(self._stored)
        return self._wide.unpack({**self._stored, **self.floats})

    def begin(self) -> None:
        """Make every stored float a parameter that requires a gradient."""
        for local, tensor in self._stored.items():
            if tensor.is_floating_point():
                self.floats[local] = nn.Parameter(tensor.detach().float().clone())

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Hold another weight [out, in]. Only a form that stores the matrix as it is can do that."""
        assert set(self._stored) == {"weight"}
        self._stored["weight"] = weight.to(self._stored["weight"].dtype)
        self.floats.clear()

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What is to be stored now. Raises NumericalError if a number is not finite."""
        for tensor in self.floats.values():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"{self.name} is not finite after training", hint="take a lower learning rate")
        trained = {local: p.detach().to(self._stored[local].dtype) for local, p in self.floats.items()}
        return {**self._stored, **trained}
