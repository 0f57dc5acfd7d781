"""Truncated singular value decomposition: the factors nearest to the weight itself (Eckart and Young 1936). No data."""

from __future__ import annotations

from torch import Tensor

from ..method import Needs
from .rank import Factorizer


class SVD(Factorizer):
    """All inputs count alike: S = 1."""

    name = "svd"
    needs = Needs.NOTHING

    def scaled(self, weight: Tensor, hessian: Tensor | None) -> Tensor:
        return weight
