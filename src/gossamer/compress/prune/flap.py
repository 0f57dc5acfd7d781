"""FLAP (An et al., arXiv 2312.11983): what hardly fluctuates goes, and its mean stays as a bias.

The score of an input column of o or down is its sample variance times the squared norm of the weights that read it.
Scores are standardized within each layer's heads and within each layer's channels, so that one ranking of all pieces
spends the budget; a piece's score is the mean of its columns'. What a removed column gave on average is added to the
bias of the layer that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from ...checkpoint import Checkpoint
from ...model import ModelConfig
from ..method import Needs, Reducer
from .cut import CutCheckpoint
from .moments import Moments, advance_watched
from .structure import (
    StructureOptions,
    channel_pieces,
    decision,
    expected,
    head_pieces,
    keep_best,
    keep_evenly,
    require_alike,
    share,
    watching_bytes,
)

if TYPE_CHECKING:
    from ..units import Units


class FLAPOptions(StructureOptions):
    bias: bool = Field(True, description="give back the mean of what goes as biases of o and down")


class FLAP(Reducer):
    """Heads and channels of least fluctuation go, over all layers at once; biases make up for their means."""

    name = "flap"
    needs = Needs.TOKENS
    Options = FLAPOptions
    options: FLAPOptions

    def expect(self, config: ModelConfig) -> ModelConfig:
        return expected(config, self.options, self.options.uniform)

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        return watching_bytes(config, sequences, length)

    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        return CutCheckpoint(checkpoint, decision, plain=self.options.uniform)

    def decide(
        self, units: Units, tokens: Tensor | None, progress: Callable[[str, int, int], None]
    ) -> dict[str, Tensor]:
        assert tokens is not None
        source, options = units.source, self.options
        config, hidden = source.config, source.config.hidden_size
        if options.uniform:
            require_alike(config, self.name)
        x, rotation = source.embed(tokens), source.rotation(tokens.shape[1])
        pieces, moments = [], []
        for i, layer in enumerate(config.layers):
            progress("measuring fluctuation", i, config.num_layers)
            block = source.block(i)
            seen = advance_watched(block, x, rotation)
            scores = {r: standardized(fluctuation(inputs, getattr(block, r).weight)) for r, inputs in seen.items()}
            heads = scores["o"].view(layer.num_heads, layer.head_dim).mean(1)
            pieces.append(head_pieces(i, layer, hidden, heads, options.heads))
            pieces.append(channel_pieces(i, layer, hidden, scores["down"], options.multiple))
            moments.append(seen)
        targets = [share(layer, hidden, options.ratio) for layer in config.layers]
        if options.uniform:
            kept = [p for n, t in enumerate(targets) for p in keep_evenly(pieces[2 * n], pieces[2 * n + 1], t, hidden)]
        else:
            kept = keep_best(pieces, sum(targets))
        made = decision(config, kept)
        if options.bias:
            for i in range(config.num_layers):
                made |= self._biases(units, i, made, moments[i])
        return made

    def _biases(
        self, units: Units, i: int, kept: Mapping[str, Tensor], moments: Mapping[str, Moments]
    ) -> dict[str, Tensor]:
        """Biases [hidden] of o and down in layer i: what they were, and the mean output of the columns that go."""
        source, made = units.source, {}
        layer = source.config.layers[i]
        heads = torch.zeros(layer.num_heads, dtype=torch.bool)
        heads[kept[f"{i}.heads"].long()] = True
        channels = torch.zeros(layer.ffn_width, dtype=torch.bool)
        channels[kept[f"{i}.channels"].long()] = True
        for role, stays in (("o", heads.repeat_interleave(layer.head_dim)), ("down", channels)):
            if stays.all() and not self.options.uniform:
                continue
            module = source.family.module(role, i)
            bias = source.weight(module).double() @ torch.where(stays, 0.0, moments[role].mean)
            if layer.has_bias(role):
                bias += source.dense(f"{module}.bias")
            made[f"{i}.{role}.bias"] = bias.float()
        return made


def fluctuation(inputs: Moments, weight: Tensor) -> Tensor:
    """Score [in] of each input column of a weight [out, in]."""
    return inputs.variance * weight.double().square().sum(0)


def standardized(scores: Tensor) -> Tensor:
    """Less their mean, over their standard deviation; zeros if they are all alike."""
    deviation = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)
