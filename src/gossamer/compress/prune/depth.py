"""Depth pruning: whole layers go.

By block influence (ShortGPT, arXiv 2403.03853): the layers whose outputs point most nearly where their inputs do, in
one pass. Or greedily: one layer at a time, the one without which the model's next-token distributions diverge least
from the original's over the calibration. Of each step, all candidates are computed in one pass over the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...checkpoint import Checkpoint
from ...errors import CompressionError, NumericalError
from ...model import ModelConfig
from ...model.decoder import softcap
from ..method import Needs, Options, Reducer
from ..source import Source
from ..walk import POSITIONS_AT_ONCE, advance, slices
from .cut import CutCheckpoint
from .structure import share, watching_bytes

if TYPE_CHECKING:
    from ..units import Units

Progress = Callable[[str, int, int], None]


class DepthOptions(Options):
    """How many layers go, and how they are found."""

    ratio: float = Field(0.2, gt=0, lt=1, description="share of the layers that goes, to the nearest one")
    greedy: bool = Field(False, description="one layer at a time, by measured divergence; slower")
    sequences: int | None = Field(
        None,
        ge=1,
        description="calibration sequences that influence comes from: recovery wants more; null: all",
    )
    tokens: int = Field(1024, ge=8, description="of `greedy`: calibration tokens that the divergence is measured on")


class Depth(Reducer):
    """Layers of least influence go, by one of two measures."""

    name = "depth"
    needs = Needs.TOKENS
    Options = DepthOptions
    options: DepthOptions

    def expect(self, config: ModelConfig) -> ModelConfig:
        sizes = [share(layer, config.hidden_size, 1.0) for layer in config.layers]
        largest = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: self._count(config)]
        return replace(config, layers=tuple(config.layers[i] for i in sorted(largest)))

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        if not self.options.greedy:
            return watching_bytes(config, sequences, length) + 4 * sequences * length * config.hidden_size
        tokens = max(self.options.tokens, length)
        ends = 4 * config.vocab_size * (config.hidden_size + 4 * POSITIONS_AT_ONCE)
        return watching_bytes(config, 1, length) + ends + 4 * (config.num_layers + 2) * tokens * config.hidden_size

    def layers_kept(self, decision: Mapping[str, Tensor], count: int) -> list[int]:
        kept: list[int] = decision["layers"].tolist()
        return kept

    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        return CutCheckpoint(checkpoint, decision)

    def decide(self, units: Units, tokens: Tensor | None, progress: Progress) -> dict[str, Tensor]:
        assert tokens is not None
        count = self._count(units.source.config)
        if self.options.greedy:
            return {"layers": _greedy(units, tokens, self.options.tokens, count, progress)}
        scores = influence(units.source, tokens, progress)
        kept = scores.argsort(descending=True, stable=True)[:count].sort().values
        return {"layers": kept.int(), "influence": scores}

    def _count(self, config: ModelConfig) -> int:
        """Layers that stay. Raises CompressionError if the ratio is too small to take one, or takes all."""
        gone = round(self.options.ratio * config.num_layers)
        if not 0 < gone < config.num_layers:
            raise CompressionError(
                f"depth: a ratio of {self.options.ratio:g} of {config.num_layers} layers means {gone} of them",
                hint=f"ratio: {1 / config.num_layers:.3f} is one layer; one must stay",
            )
        return config.num_layers - gone


@torch.no_grad()
def influence(source: Source, tokens: Tensor, progress: Progress) -> Tensor:
    """Block influence [layers], float64: 1 less the mean cosine between what a block reads and what it gives."""
    x, rotation = source.embed(tokens), source.rotation(tokens.shape[1])
    scores = []
    for i in range(source.config.num_layers):
        progress("measuring the layers' influence", i, source.config.num_layers)
        before = x.clone()
        advance(source.block(i), x, rotation)
        cosines = [F.cosine_similarity(x[c].double(), before[c].double(), dim=-1).flatten() for c in slices(x)]
        scores.append(1 - torch.cat(cosines).mean())
    found = torch.stack(scores)
    if not torch.isfinite(found).all():
        raise NumericalError("activations are not finite", hint="the checkpoint is damaged")
    return found


def _greedy(units: Units, tokens: Tensor, limit: int, count: int, progress: Progress) -> Tensor:
    """Layers that stay [count]. Each step is a unit, so that a killed run goes on behind the last one."""
    source = units.source
    length = min(tokens.shape[1], limit)
    tokens = tokens[: max(1, limit // length), :length]
    judge = Judge(source, tokens)
    kept = list(range(source.config.num_layers))
    for step in range(source.config.num_layers - count):
        name = f"step-{step:04d}"
        if not units.is_done(name):
            losses = divergences(source, kept, tokens, judge, progress)
            gone = kept[int(losses.argmin())]
            units.write(name, {"gone": torch.tensor([gone]), "layers": torch.tensor(kept), "divergence": losses}, {})
        kept.remove(int(units.open(name).read("gone")))
    return torch.tensor(kept, dtype=torch.int32)


@torch.no_grad()
def divergences(source: Source, kept: list[int], tokens: Tensor, judge: Judge, progress: Progress) -> Tensor:
    """Mean divergence [kept], nats per token, of the model of these layers without each of them in turn."""
    rotation = source.rotation(tokens.shape[1])
    whole, without = source.embed(tokens), list[Tensor]()
    for n, i in enumerate(kept):
        progress(f"measuring what the model is without each of {len(kept)} layers", n, len(kept))
        block = source.block(i)
        for x in without:
            advance(block, x, rotation)
        without.append(whole.clone())
        advance(block, whole, rotation)
    return judge.divergences(without)


class Judge:
    """KL divergence from the original, whose final states it makes once."""

    @torch.no_grad()
    def __init__(self, source: Source, tokens: Tensor) -> None:
        self.states = source.embed(tokens)
        rotation = source.rotation(tokens.shape[1])
        for i in range(source.config.num_layers):
            advance(source.block(i), self.states, rotation)
        self.norm, self.head, self.cap = source.norm("final_norm"), source.head(), source.config.final_softcap

    def divergences(self, candidates: Sequence[Tensor]) -> Tensor:
        """Mean over the positions [candidates], float64, of final states [sequences, time, hidden]."""
        totals = torch.zeros(len(candidates), dtype=torch.float64)
        count = self.states.shape[0] * self.states.shape[1]
        for start in range(0, count, POSITIONS_AT_ONCE):
            truth = self._log_probabilities(self.states, start)
            weights = truth.exp()
            for n, states in enumerate(candidates):
                lost = truth - self._log_probabilities(states, start)
                totals[n] += (weights * lost).sum(dtype=torch.float64)
        if not torch.isfinite(totals).all():
            raise NumericalError("the model's logits are not finite", hint="the checkpoint is damaged")
        return totals / count

    def _log_probabilities(self, states: Tensor, start: int) -> Tensor:
        rows = states.flatten(0, 1)[start : start + POSITIONS_AT_ONCE]
        return softcap(F.linear(self.norm(rows), self.head), self.cap).log_softmax(-1)
