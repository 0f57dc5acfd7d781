"""What all low-rank methods share: which rank each layer has, and the two factors once a basis is chosen.

With A [out, k] the first k left singular vectors of a scaled weight W S, the truncated (W S)_k S^-1 is A A^T W: so a
method says S alone, nothing is inverted, and where S has no inverse the weight is still only projected.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import NumericalError
from ...formats import Dense, Format, LowRank
from ...formats.low_rank import dense_factors, worthwhile_rank
from ...model import ModelConfig
from ..grids import keys_of, linear_shapes
from ..method import LayerMethod, Options

MULTIPLE = 32
"""Columns that the engine's kernels multiply at once."""


class RankOptions(Options):
    """How much of a layer is kept: a share of its parameters, or a rank."""

    ratio: float | None = Field(
        default=None, gt=0, le=1, description="share of the layer's parameters that its factors have; 1: stays whole"
    )
    rank: int | None = Field(default=None, ge=1, description="the rank itself, in place of `ratio`")

    @model_validator(mode="after")
    def _one(self) -> RankOptions:
        if self.ratio is not None and self.rank is not None:
            raise ValueError("ratio and rank: both say how large the factors are")
        return self

    def of(self, shape: tuple[int, ...], multiple: int, least: int) -> int | None:
        """The rank of factors of a matrix of this shape, or None where they would be no smaller than it."""
        whole = worthwhile_rank(shape)
        if self.rank is not None:
            rank = self.rank
        else:
            assert self.ratio is not None
            wanted = self.ratio * shape[0] * shape[1] / (shape[0] + shape[1])
            rank = whole if self.ratio == 1 else max(round(wanted / multiple) * multiple, least)
        return rank if rank < whole else None


class FactorizeOptions(RankOptions):
    """Options that every low-rank method takes: `ratio: 0.8` unless one is given."""

    multiple: int = Field(default=MULTIPLE, ge=1, description="ranks that follow from a ratio are multiples of it")
    min_rank: int = Field(default=MULTIPLE, ge=1, description="smallest rank that follows from a ratio")
    layers: dict[str, RankOptions] = Field(
        default_factory=dict,
        description="a role (`down`) or a glob of module names (`*.down_proj`) -> its own ratio or rank; of several "
        "that match, the longest text wins",
    )
    allocate: Literal["kld"] | None = Field(
        default=None,
        description="kld: a rank for each layer by the measured divergence, `ratio` of all their parameters together",
    )
    settled: bool = Field(default=False, description="`layers` says what was allocated: measure nothing again")

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:
        given = isinstance(data, dict) and (data.get("ratio") is not None or data.get("rank") is not None)
        return data if given or not isinstance(data, dict) else {**data, "ratio": 0.8}

    @model_validator(mode="after")
    def _check(self) -> FactorizeOptions:
        for key, own in self.layers.items():
            if own.ratio is None and own.rank is None:
                raise ValueError(f"layers.{key:.80} says no ratio and no rank: `{{ratio: 0.5}}`, say")
        if self.allocate and not self.settled and (self.layers or self.rank is not None):
            raise ValueError("allocate and layers or rank: both say what rank a layer has")
        return self


class Factorizer(LayerMethod):
    """A method that keeps a weight's projection to its most important directions, as two factors."""

    family = "factorize"
    Options = FactorizeOptions
    options: FactorizeOptions

    def ranks(self, config: ModelConfig) -> dict[str, int | None]:
        """Module name of every linear layer -> the rank of its factors; None where it stays whole."""
        options = self.options
        keys, shapes = keys_of(config, options.layers), linear_shapes(config)
        chosen = {module: options if key is None else options.layers[key] for module, key in keys.items()}
        return {m: chosen[m].of(shape, options.multiple, options.min_rank) for m, shape in shapes.items()}

    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        """Factors of the chosen ranks in the model's float dtype; layers that stay whole are as before."""
        ranks = self.ranks(config)
        return {m: before[m] if rank is None else LowRank(rank, before[m]) for m, rank in ranks.items()}

    def store(self, weight: Tensor, form: Format, hessian: Tensor | None) -> dict[str, Tensor]:
        """U = A and V = A^T W for the best basis A [out, rank] of the outputs. Raises NumericalError.

        The columns of A are alike in size, so that codes of U in groups of columns lose nothing to a larger one.
        """
        if isinstance(form, Dense):
            return {"weight": weight.to(form.dtype)}
        assert isinstance(form, LowRank)
        basis = self.basis(weight, hessian)[0][:, : form.rank]
        return dense_factors(form, basis, basis.T @ weight.double())

    def basis(self, weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
        """Left singular vectors [out, n] of the scaled weight, and its singular values [n] that fall; float64."""
        scaled = self.scaled(weight.double(), None if hessian is None else hessian.double())
        if not torch.isfinite(scaled).all():
            raise NumericalError("the inputs of this layer are not finite", hint="the checkpoint is damaged")
        left, values, _ = torch.linalg.svd(scaled, full_matrices=False)
        return left, values

    @abc.abstractmethod
    def scaled(self, weight: Tensor, hessian: Tensor | None) -> Tensor:
        """W S: the float64 weight [out, in] with its inputs weighed, whose singular vectors are kept."""

    def peak_bytes(self, shape: tuple[int, ...]) -> int:
        out, columns = shape
        return 8 * (4 * out * columns + 4 * columns * columns + 2 * min(shape) ** 2)
