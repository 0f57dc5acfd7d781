"""Wanda-SP: Wanda's scores (Sun et al., arXiv 2306.11695) summed over what goes together, as FLAP's paper compares it.

The score of a weight is its magnitude times the norm of its input over the calibration. A channel's is the sum over its
column of down, a head's over its columns of o. Every layer loses the same share, so the layers stay alike; each is
scored on the inputs that the pruned layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...model import ModelConfig
from ..method import Needs, Reducer
from ..walk import advance
from .cut import CutCheckpoint
from .moments import Moments, advance_watched
from .structure import (
    StructureOptions,
    channel_pieces,
    decision,
    expected,
    head_pieces,
    keep_evenly,
    require_alike,
    share,
    watching_bytes,
)

if TYPE_CHECKING:
    from ..units import Units


class WandaSP(Reducer):
    """The heads and channels of least magnitude times input norm go, the same share in every layer."""

    name = "wanda-sp"
    needs = Needs.TOKENS
    Options = StructureOptions
    options: StructureOptions

    def expect(self, config: ModelConfig) -> ModelConfig:
        return expected(config, self.options, even=True)

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        return watching_bytes(config, sequences, length) + 4 * sequences * length * config.hidden_size

    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        return CutCheckpoint(checkpoint, decision)

    def decide(
        self, units: Units, tokens: Tensor | None, progress: Callable[[str, int, int], None]
    ) -> dict[str, Tensor]:
        assert tokens is not None
        source, options = units.source, self.options
        config, hidden = source.config, source.config.hidden_size
        if options.uniform:
            require_alike(config, self.name)
        x, rotation = source.embed(tokens), source.rotation(tokens.shape[1])
        kept = []
        for i, layer in enumerate(config.layers):
            progress("scoring heads and channels", i, config.num_layers)
            block = source.block(i)
            seen = advance_watched(block, x.clone(), rotation)
            scores = {role: magnitude(inputs, getattr(block, role).weight) for role, inputs in seen.items()}
            heads = scores["o"].view(layer.num_heads, layer.head_dim).sum(1)
            stay = keep_evenly(
                head_pieces(i, layer, hidden, heads, options.heads),
                channel_pieces(i, layer, hidden, scores["down"], options.multiple),
                share(layer, hidden, options.ratio),
                hidden if options.uniform else 0,
            )
            kept += stay
            cut = CutCheckpoint(source.checkpoint, decision(config, stay))
            with torch.no_grad():
                advance(type(source)(cut).block(i), x, rotation)
        return decision(config, kept)


def magnitude(inputs: Moments, weight: Tensor) -> Tensor:
    """Score [in] of each input column of a weight [out, in]: the sum of |w| times the norm of the column's inputs."""
    return weight.double().abs().sum(0) * (inputs.squares * inputs.count).sqrt()
