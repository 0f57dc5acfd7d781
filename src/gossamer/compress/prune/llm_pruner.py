"""LLM-Pruner (Ma et al., arXiv 2305.11627): what depends on each other goes as one, by what that does to the loss.

A channel is its rows of gate and up and its column of down; a head its rows of q and columns of o, with the rows of k
and v that its group shares. The loss changes by about the sum of weight times gradient: `element` adds up the
magnitudes for single weights of the gradient over all sequences, as the paper does; `vector` those of the sums over
whole rows or columns, one sequence after another. On text that the model itself wrote the gradient is zero but for
chance, so both measure how much it varies.

As in the paper every layer that is pruned loses the same share, and the first and last ones may be spared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...checkpoint import Checkpoint
from ...errors import CompressionError
from ...model import LayerConfig, ModelConfig
from ..gradients import gradient_unit, measure
from ..method import Needs, Reducer
from .cut import CutCheckpoint
from .structure import (
    StructureOptions,
    channel_pieces,
    decision,
    even_widths,
    head_pieces,
    keep_evenly,
    require_alike,
    share,
    watching_bytes,
)

if TYPE_CHECKING:
    from ..units import Units


class LLMPrunerOptions(StructureOptions):
    importance: Literal["element", "vector"] = Field("element", description="what is added up: see the method's file")
    spare_first: int = Field(0, ge=0, description="layers at the beginning that stay as they are")
    spare_last: int = Field(0, ge=0, description="layers at the end that stay as they are")

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if self.uniform and (self.spare_first or self.spare_last):
            raise ValueError("uniform: spared layers would be unlike the others: leave one of them away")
        return self


class LLMPruner(Reducer):
    """Heads and channels go whose weights times gradients are least, the same share in every layer that is pruned."""

    name = "llm-pruner"
    needs = Needs.GRADIENT
    Options = LLMPrunerOptions
    options: LLMPrunerOptions

    def expect(self, config: ModelConfig) -> ModelConfig:
        ratio, pruned = self._ratio(config)
        hidden, options = config.hidden_size, self.options
        layers = [even_widths(r, hidden, options, ratio) if i in pruned else r for i, r in enumerate(config.layers)]
        return replace(config, layers=tuple(layers))

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        return watching_bytes(config, sequences, length)

    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        return CutCheckpoint(checkpoint, decision)

    def decide(
        self, units: Units, tokens: Tensor | None, progress: Callable[[str, int, int], None]
    ) -> dict[str, Tensor]:
        assert tokens is not None
        config, options = units.source.config, self.options
        hidden, (ratio, pruned) = config.hidden_size, self._ratio(config)
        if options.uniform:
            require_alike(config, self.name)
        measure(units, tokens, progress, Salience)
        kept = []
        for i in pruned:
            layer, file = config.layers[i], units.open(gradient_unit(i))
            found = {role: file.read(f"{role}.{options.importance}") for role in layer.linear_shapes(hidden)}
            kept += keep_evenly(
                head_pieces(i, layer, hidden, head_scores(layer, found), options.heads),
                channel_pieces(i, layer, hidden, channel_scores(found), options.multiple),
                share(layer, hidden, ratio),
                hidden if options.uniform else 0,
            )
        return decision(config, kept)

    def _ratio(self, config: ModelConfig) -> tuple[float, range]:
        """The share that goes of each pruned layer, so that it is the wanted one of all; and which are pruned."""
        pruned = range(self.options.spare_first, config.num_layers - self.options.spare_last)
        sizes = [share(layer, config.hidden_size, 1.0) for layer in config.layers]
        loose = sum(sizes[i] for i in pruned)
        if not loose or self.options.ratio * sum(sizes) > loose:
            raise CompressionError(
                f"llm-pruner: {self.options.ratio:g} of all weights cannot go from {len(pruned)} of "
                f"{config.num_layers} layers",
                hint="a smaller ratio, or fewer spared layers",
            )
        return self.options.ratio * sum(sizes) / loose, pruned


class Salience:
    """Magnitudes of weight times gradient by row, of o and down by column: `ROLE.element` and `ROLE.vector` [units]."""

    def __init__(self, weights: Mapping[str, Tensor], sequences: int) -> None:
        self.weights, self.sequences = weights, sequences
        self.mean = {role: torch.zeros_like(weight) for role, weight in weights.items()}
        self.vector = {role: torch.zeros(weight.shape[1 - _axis(role)]) for role, weight in weights.items()}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        for role, gradient in gradients.items():
            self.mean[role].add_(gradient, alpha=1 / self.sequences)
            self.vector[role] += (self.weights[role] * gradient).sum(_axis(role)).abs() / self.sequences

    def tensors(self) -> dict[str, Tensor]:
        element = {r: (self.weights[r] * mean).abs().sum(_axis(r)) for r, mean in self.mean.items()}
        return {f"{r}.element": t for r, t in element.items()} | {f"{r}.vector": t for r, t in self.vector.items()}


def head_scores(layer: LayerConfig, found: Mapping[str, Tensor]) -> Tensor:
    """Importance [num_heads] from sums by role; what a group shares is divided among its query heads."""
    own = (found["q"] + found["o"]).view(layer.num_heads, layer.head_dim).sum(1)
    shared = (found["k"] + found["v"]).view(layer.num_kv_heads, layer.head_dim).sum(1)
    return own + shared.repeat_interleave(layer.group) / layer.group


def channel_scores(found: Mapping[str, Tensor]) -> Tensor:
    """Importance [ffn_width] from sums by role."""
    return torch.stack([found[role] for role in ("gate", "up", "down") if role in found]).sum(0)


def _axis(role: str) -> int:
    """The axis of a weight [out, in] along which what belongs together lies: a row's, or a column's of o and down."""
    return 0 if role in ("o", "down") else 1
