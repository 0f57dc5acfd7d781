"""Magnitude pruning (Han et al., arXiv 1506.02626): the smallest weights of a layer become zero. The baseline."""

from __future__ import annotations

from torch import Tensor

from ..method import Needs
from .masks import Pruner


class Magnitude(Pruner):
    """Compares all weights of a layer with one another; needs no data."""

    name = "magnitude"
    needs = Needs.NOTHING

    def prune(self, weight: Tensor, sparsity: float, hessian: Tensor | None) -> Tensor:
        """The float32 weight [out, in] without its smallest; the Hessian is not looked at."""
        return weight.masked_fill(self.lowest(weight.abs(), sparsity), 0.0)
