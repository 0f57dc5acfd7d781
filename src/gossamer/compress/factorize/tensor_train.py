"""TensorGPT (Xu et al., arXiv 2307.00526): every token's embedding as a tensor train of its own. Linear layers stay."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from ...errors import RecipeError
from ...formats import Dense, Format, TensorTrain
from ...model import FAMILIES, ModelConfig
from ..method import LayerMethod, Needs, Options


class TensorTrainOptions(Options):
    ratio: float = Field(default=0.5, gt=0, le=1, description="share of the embedding's parameters that its cores have")
    modes: list[int] | None = Field(
        default=None, description="what a row is folded to; null: two modes as near to each other as can be"
    )
    ranks: list[int] | None = Field(default=None, description="ranks between the modes, in place of `ratio`")


class TensorTrainEmbedding(LayerMethod):
    """TT-SVD of each row of the embedding; a tied head multiplies by the same rows."""

    family = "factorize"
    name = "tensor-train"
    needs = Needs.NOTHING
    Options = TensorTrainOptions
    options: TensorTrainOptions

    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        """The embedding's cores in the model's float dtype. Raises ShapeMismatch, RecipeError."""
        options, module = self.options, FAMILIES[config.family].embed
        modes = tuple(options.modes or _square(config.hidden_size))
        form = before[module]
        if not isinstance(form, Dense):
            raise RecipeError(f"{self.name} takes a float embedding, not {form.name}")
        ranks = tuple(options.ranks) if options.ranks else _ranks(modes, options.ratio)
        return {module: TensorTrain(modes, ranks, form.dtype)}

    def store(self, weight: Tensor, form: Format, hessian: Tensor | None) -> dict[str, Tensor]:
        """Cores of a weight [vocab_size, hidden_size]."""
        assert isinstance(form, TensorTrain)
        return form.decompose(weight)

    def peak_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * 4 * math.prod(shape)  # in float32: the weight, its cores, what they stand for, the difference


def _square(columns: int) -> tuple[int, int]:
    """Two factors of a row's length, as near to each other as can be."""
    first = next(n for n in range(math.isqrt(columns), 0, -1) if columns % n == 0)
    return first, columns // first


def _ranks(modes: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """The largest rank, the same at every joint that allows it, whose cores have at most this share of a row."""
    most = [min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes))]
    for rank in range(max(most, default=1), 1, -1):
        ranks = [min(rank, n) for n in most]
        ends = [1, *ranks, 1]
        if sum(ends[k] * mode * ends[k + 1] for k, mode in enumerate(modes)) <= ratio * math.prod(modes):
            return tuple(ranks)
    return (1,) * len(most)
