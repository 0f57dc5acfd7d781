"""ASVD (Yuan et al., arXiv 2312.05821): input channels weighed by how large their activations are."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..method import Needs
from .rank import FactorizeOptions, Factorizer


class ASVDOptions(FactorizeOptions):
    alpha: float = Field(default=0.5, gt=0, le=2, description="power of a channel's root mean square that weighs it")


class ASVD(Factorizer):
    """S = diag(rms(x_j) ^ alpha), by the root mean square of each channel in place of the paper's mean magnitude."""

    name = "asvd"
    needs = Needs.HESSIAN
    Options = ASVDOptions
    options: ASVDOptions

    def scaled(self, weight: Tensor, hessian: Tensor | None) -> Tensor:
        assert hessian is not None
        size = hessian.diagonal().clamp(min=0).sqrt()
        return weight * (size / size.max().clamp(min=1e-300)) ** self.options.alpha
