"""Which weights go: options and selection that all methods of unstructured and N:M pruning share."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import ShapeMismatch
from ...formats import Dense, Format, Sparse
from ...model import ModelConfig
from ..grids import keys_of, linear_shapes
from ..method import LayerMethod, Options

PATTERNS: dict[str, tuple[int, int]] = {"2:4": (2, 4), "4:8": (4, 8)}
"""Weights that stay, of how many columns after one another."""
Share = Annotated[float, Field(ge=0, lt=1)]


class PruneOptions(Options):
    """How many weights of each layer become zero, and in which pattern."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of each layer's weights that become zero")
    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        "unstructured", description="2:4, 4:8: so many of so many columns after one another stay, in every row"
    )
    layers: dict[str, Share] = Field(
        default_factory=dict,
        description="a role (`down`) or a glob of module names -> a sparsity of its own; 0 leaves a layer as it is",
    )

    @model_validator(mode="after")
    def _pattern_decides(self) -> PruneOptions:
        if self.pattern != "unstructured":
            n, m = PATTERNS[self.pattern]
            for share in (self.sparsity, *self.layers.values()):
                if share not in (0, 1 - n / m):
                    raise ValueError(f"pattern {self.pattern} has sparsity {1 - n / m:g}, not {share:g}")
        return self


class OWLOptions(PruneOptions):
    """The same for methods that see inputs: they can measure what each block may lose."""

    allocate: Literal["uniform", "owl"] = Field(
        "uniform", description="owl: blocks with more outliers lose less; `sparsity` is the mean"
    )
    outlier: float = Field(5.0, gt=0, description="owl: a score so many times the mean of its layer is an outlier")
    spread: float = Field(0.08, ge=0, lt=0.5, description="owl: how far a block's sparsity may be from the mean")

    @model_validator(mode="after")
    def _owl_is_free(self) -> OWLOptions:
        if self.allocate == "owl" and self.pattern != "unstructured":
            raise ValueError(f"pattern {self.pattern} has one sparsity: allocate owl is for unstructured")
        return self


class Pruner(LayerMethod):
    """A method that makes weights zero; what is left is stored without them, in the model's float dtype."""

    family = "prune"
    Options: ClassVar[type[PruneOptions]] = PruneOptions
    options: PruneOptions

    @abc.abstractmethod
    def prune(self, weight: Tensor, sparsity: float, hessian: Tensor | None) -> Tensor:
        """The float32 weight [out, in] with round(sparsity * out * in) zeros, or with those of the pattern."""

    def store(self, weight: Tensor, form: Format, hessian: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of the pruned weight, or of a weight that is left as it is."""
        if isinstance(form, Sparse):
            return form.compress(self.prune(weight, form.sparsity, hessian))
        assert isinstance(form, Dense)
        return {"weight": weight.to(form.dtype)}

    def peak_bytes(self, shape: tuple[int, ...]) -> int:
        """Scores of a weight and their order."""
        return 20 * math.prod(shape)

    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        """Every linear layer without its zeros. Raises RecipeError, or ShapeMismatch if the pattern does not fit."""
        formats: dict[str, Format] = {}
        shapes = linear_shapes(config)
        for module, key in keys_of(config, self.options.layers).items():
            sparsity, dense = self.options.sparsity if key is None else self.options.layers[key], before[module]
            assert isinstance(dense, Dense)
            self._check_pattern(module, shapes[module][1])
            formats[module] = Sparse(dense, sparsity) if sparsity else dense
        return formats

    def lowest(self, scores: Tensor, sparsity: float, rows: bool = False) -> Tensor:
        """bool [out, in]: the weights of lowest score in their pattern; else of the layer, or of each row (`rows`)."""
        if self.options.pattern != "unstructured":
            n, m = PATTERNS[self.options.pattern]
            return lowest_of_groups(scores, m - n, m)
        return lowest_of_rows(scores, sparsity) if rows else lowest_of_all(scores, round(sparsity * scores.numel()))

    def _check_pattern(self, module: str, columns: int) -> None:
        pattern = self.options.pattern
        if pattern != "unstructured" and columns % PATTERNS[pattern][1]:
            raise ShapeMismatch(
                f"{module}: pattern {pattern} does not divide {columns} columns", hint="pattern: unstructured"
            )


def lowest_of_all(scores: Tensor, count: int) -> Tensor:
    """bool [out, in]: the `count` lowest scores [out, in]; of equal ones the first."""
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)[: count - int(chosen.sum())]
    chosen[ties] = True
    return chosen.view(scores.shape)


def lowest_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """bool [out, in]: the lowest scores of each row, round(sparsity * out * in) in all and as even as can be."""
    out = len(scores)
    upto = torch.arange(out + 1) * round(sparsity * scores.numel()) // out
    return _first_of(scores.argsort(dim=1, stable=True), upto.diff().unsqueeze(1))


def lowest_of_groups(scores: Tensor, count: int, size: int) -> Tensor:
    """bool [out, in]: the `count` lowest scores of every `size` columns after one another."""
    groups = scores.reshape(-1, size)
    return _first_of(groups.argsort(dim=1, stable=True), torch.tensor([[count]])).view(scores.shape)


def _first_of(order: Tensor, counts: Tensor) -> Tensor:
    """bool [rows, columns]: the columns that come first in each row's order; counts [rows or 1, 1]."""
    chosen = (torch.arange(order.shape[1]) < counts).expand(order.shape)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order, chosen)
