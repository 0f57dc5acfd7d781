"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): weights become zero, and later columns make up for each.

With H = X^T X over the calibration inputs of a layer and U the upper Cholesky factor of H^-1, removing weight i of a
row costs w_i^2 / U_ii^2 once the columns before it are settled, and subtracting w_i / U_ii * U_i,j from every later
column j is the least-squares repair. What goes is chosen for a block of columns at a time, on weights as repaired.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..method import Needs
from ..quantize.gptq import inverse_factor
from .masks import PATTERNS, OWLOptions, Pruner, lowest_of_all, lowest_of_groups

BLOCK = 128
"""Columns among which weights are chosen at once, over all rows (the paper's B and B_s)."""


class SparseGPTOptions(OWLOptions):
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")


class SparseGPT(Pruner):
    """Second-order pruning; damping raises itself tenfold until the Hessian can be factorized."""

    name = "sparsegpt"
    needs = Needs.HESSIAN
    Options = SparseGPTOptions
    options: SparseGPTOptions

    def prune(self, weight: Tensor, sparsity: float, hessian: Tensor | None) -> Tensor:
        """The float32 weight [out, in], pruned and repaired by `hessian` [in, in] (arXiv 2301.00774, algorithm 1).

        Raises NumericalError if no damping makes the Hessian invertible.
        """
        assert hessian is not None
        out, columns = weight.shape
        factor = inverse_factor(hessian, torch.arange(columns), self.options.damping)
        work = weight.masked_fill(hessian.diagonal() == 0, 0.0).T.contiguous()  # a column of it is a contiguous row
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            count = round(sparsity * out * stop) - round(sparsity * out * start)
            errors = self._prune_block(work[start:stop], factor[start:stop, start:stop], count)
            work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        return work.T.contiguous()

    def _prune_block(self, block: Tensor, factor: Tensor, count: int) -> Tensor:
        """Prune and repair some columns in place, [columns, out]; returns what each of them lost, [columns, out]."""
        errors, gone = torch.empty_like(block), torch.empty(block.shape, dtype=torch.bool)
        unstructured = self.options.pattern == "unstructured"
        n, size = (0, len(block)) if unstructured else PATTERNS[self.options.pattern]
        for i in range(len(block)):
            if i % size == 0:
                cost = (block[i : i + size] / factor.diagonal()[i : i + size].unsqueeze(1)).square_()
                gone[i : i + size] = (
                    lowest_of_all(cost, count) if unstructured else lowest_of_groups(cost.T, size - n, size).T
                )
            torch.mul(block[i], gone[i], out=errors[i]).div_(factor[i, i])
            block[i].masked_fill_(gone[i], 0.0)
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        return errors
