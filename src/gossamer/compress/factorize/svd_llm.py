"""SVD-LLM (Wang et al., arXiv 2403.07378): the factors of least squared error of the layer's outputs.

With H = X^T X = Q L Q^T and S = Q L^(1/2), the output error |(W - W') X^T| is |(W - W') S|, so the truncated SVD of W S
is the best of its rank. Two symmetric decompositions take the place of the paper's Cholesky factor, as in its second
version (arXiv 2503.12340): they need no H that is positive definite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..method import Needs
from .rank import Factorizer


class SVDLLM(Factorizer):
    """S = Q L^(1/2), so that the inputs are white."""

    name = "svd-llm"
    needs = Needs.HESSIAN

    def scaled(self, weight: Tensor, hessian: Tensor | None) -> Tensor:
        assert hessian is not None
        if not torch.isfinite(hessian).all():
            return hessian  # which `basis` refuses
        values, vectors = torch.linalg.eigh(hessian)
        root: Tensor = vectors * values.clamp(min=0).sqrt()
        return weight @ root
