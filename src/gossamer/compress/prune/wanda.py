"""Wanda (Sun et al., arXiv 2306.11695): weights that matter least to their row's output become zero.

A weight's score is its size times the norm of the input that it meets, |w_ij| * ||x_j||; scores are compared within a
row of the weight, since a row is one output.
"""

from __future__ import annotations

from torch import Tensor

from ..method import Needs
from .masks import OWLOptions, Pruner


class Wanda(Pruner):
    """Compares the weights of each row by what they do to its output; changes no other weight."""

    name = "wanda"
    needs = Needs.HESSIAN
    Options = OWLOptions

    def prune(self, weight: Tensor, sparsity: float, hessian: Tensor | None) -> Tensor:
        """The float32 weight [out, in] without those of lowest score; ||x_j||^2 is the diagonal of `hessian`."""
        assert hessian is not None
        scores = weight.abs() * hessian.diagonal().sqrt()
        return weight.masked_fill(self.lowest(scores, sparsity, rows=True), 0.0)
