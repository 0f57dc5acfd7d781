"""What can be cut out of a decoder whole: heads with their keys and values, channels of the feed-forward network.

Pieces are the smallest parts that may go: a key-value head with all query heads that share it (or one query head of
every group), and `multiple` channels. Here they are made from scores and chosen until a share of the blocks' weights is
gone; what a score means is a method's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ...errors import CompressionError
from ...model import LayerConfig, ModelConfig
from ..method import Options
from ..walk import TOKENS_AT_ONCE

Heads: TypeAlias = Literal["group", "query", "keep"]


class StructureOptions(Options):
    """How much goes, and in which pieces."""

    ratio: float = Field(0.2, gt=0, lt=1, description="share of the blocks' weights that goes, norms and biases apart")
    heads: Heads = Field(
        "group",
        description="group: a key-value head with its query heads; query: one query head of every group; keep: none",
    )
    multiple: int = Field(
        32, ge=1, le=4096, description="channels that go together: kernels and quantization groups want whole ones"
    )
    uniform: bool = Field(
        False,
        description="all layers alike, and a number of heads that divides the hidden size, as other engines want it",
    )
    sequences: int | None = Field(
        None, ge=1, description="calibration sequences that scores come from: recovery wants more; null: all"
    )


@dataclass(frozen=True)
class Piece:
    """Heads or channels of a layer that go or stay together."""

    layer: int
    part: Literal["heads", "channels"]
    members: tuple[int, ...]
    """Query heads or channels, by their numbers in the layer as it was."""
    score: float
    cost: int
    """Weights that go with it."""


def head_pieces(i: int, layer: LayerConfig, hidden: int, scores: Tensor, heads: Heads) -> list[Piece]:
    """Pieces of layer i's heads by scores [num_heads], the best first; one that is not to go is none."""
    if heads == "keep":
        return []
    grouped = scores.view(layer.num_kv_heads, layer.group)
    numbers = torch.arange(layer.num_heads).view_as(grouped)
    cost = 2 * hidden * layer.head_dim
    if heads == "group":
        cost *= layer.group + 1
    else:  # the best of every group make the first piece, the second best the next one
        order = grouped.argsort(dim=1, descending=True, stable=True)
        grouped, numbers = grouped.gather(1, order).T, numbers.gather(1, order).T
        cost *= layer.num_kv_heads
    pieces = [
        Piece(i, "heads", tuple(members.sort().values.tolist()), float(score), cost)
        for members, score in zip(numbers, grouped.mean(1), strict=True)
    ]
    return sorted(pieces, key=lambda piece: -piece.score)


def channel_pieces(i: int, layer: LayerConfig, hidden: int, scores: Tensor, multiple: int) -> list[Piece]:
    """Pieces of layer i's channels by scores [ffn_width], the best first, each of `multiple` but perhaps the last."""
    order = scores.argsort(descending=True, stable=True)
    cost = (3 if layer.gated else 2) * hidden
    return [
        Piece(i, "channels", tuple(part.sort().values.tolist()), float(scores[part].mean()), cost * len(part))
        for part in torch.split(order, multiple)
    ]


def keep_best(lists: Sequence[Sequence[Piece]], target: int) -> list[Piece]:
    """What is left when the pieces of lowest score over all lists are gone, as near to `target` weights as they come.

    The first of a list stays. Raises CompressionError if that leaves too much.
    """
    loose = [(piece.score, -n, piece) for pieces in lists for n, piece in enumerate(pieces) if n]
    _check_reach(sum(piece.cost for _, _, piece in loose), target)
    step = max((piece.cost for _, _, piece in loose if piece.part == "channels"), default=0)
    gone, total = set[int](), 0
    for _, _, piece in sorted(loose, key=lambda row: (row[0], row[1], row[2].layer, row[2].part)):
        if total + piece.cost <= target + step / 2:  # heads too large for what is left to go make room for channels
            gone.add(id(piece))
            total += piece.cost
    return [piece for pieces in lists for piece in pieces if id(piece) not in gone]


def keep_evenly(heads: Sequence[Piece], channels: Sequence[Piece], target: int, divides: int = 0) -> list[Piece]:
    """The same within one layer: the same share of its heads and channels, as near as their pieces allow.

    Where not all heads stay, the number of those that do divides `divides`.
    """
    _check_reach(sum(piece.cost for piece in (*heads[1:], *channels[1:])), target)
    of_heads, of_channels = _costs_behind(heads), _costs_behind(channels)
    wanted = len(heads) * (1 - target / (of_heads[0] + of_channels[0]))
    counts = [n for n in range(1, len(heads)) if divides % sum(len(piece.members) for piece in heads[:n]) == 0]
    step, best = max(piece.cost for piece in channels), []
    for h in (*counts, len(heads)):
        miss, c = min((abs(of_heads[h] + of_channels[c] - target), c) for c in range(1, len(of_channels)))
        best.append((max(miss - step / 2, 0), abs(h - wanted), h, c))
    _, _, h, c = min(best)
    return [*heads[:h], *channels[:c]]


def _costs_behind(pieces: Sequence[Piece]) -> list[int]:
    """What goes if the first n stay, for n from 0 to all."""
    return list(accumulate((piece.cost for piece in reversed(pieces)), initial=0))[::-1]


def even_widths(layer: LayerConfig, hidden: int, options: StructureOptions, ratio: float) -> LayerConfig:
    """The layer as `keep_evenly` leaves it, whatever the scores are."""
    kept = keep_evenly(
        head_pieces(0, layer, hidden, torch.zeros(layer.num_heads), options.heads),
        channel_pieces(0, layer, hidden, torch.zeros(layer.ffn_width), options.multiple),
        share(layer, hidden, ratio),
        hidden if options.uniform else 0,
    )
    heads = [n for piece in kept if piece.part == "heads" for n in piece.members] or range(layer.num_heads)
    groups = {n // layer.group for n in heads}
    width = sum(len(piece.members) for piece in kept if piece.part == "channels")
    return replace(layer, num_heads=len(heads), num_kv_heads=len(groups), ffn_width=width)


def expected(config: ModelConfig, options: StructureOptions, even: bool) -> ModelConfig:
    """A config as large as the pruned one, and the same if all layers lose the same share (`even`).

    Others can end at any multiple: here at an odd one, so that what divides only some is refused before any work.
    """
    layers = [even_widths(layer, config.hidden_size, options, options.ratio) for layer in config.layers]
    if not even:
        step = options.multiple
        layers = [
            replace(layer, ffn_width=layer.ffn_width + step * (layer.ffn_width // step % 2 == 0)) for layer in layers
        ]
    return replace(config, layers=tuple(layers))


def share(layer: LayerConfig, hidden: int, ratio: float) -> int:
    """So many of a layer's weights are to go."""
    return round(ratio * sum(math.prod(shape) for shape in layer.linear_shapes(hidden).values()))


def decision(config: ModelConfig, kept: Sequence[Piece]) -> dict[str, Tensor]:
    """What a CutCheckpoint is made from: `I.heads` and `I.channels` of each layer; all of them where no piece is."""
    made: dict[str, Tensor] = {}
    for i, layer in enumerate(config.layers):
        for part, whole in (("heads", layer.num_heads), ("channels", layer.ffn_width)):
            members = sorted(n for p in kept if (p.layer, p.part) == (i, part) for n in p.members)
            made[f"{i}.{part}"] = torch.tensor(members or range(whole), dtype=torch.int32)
    return made


def require_alike(config: ModelConfig, name: str) -> None:
    """Raises CompressionError unless all layers have one shape, as they must where the result is to be uniform."""
    if len(set(config.layers)) > 1:
        raise CompressionError(
            f"{name} with uniform: true needs a model whose layers are alike, but this one's differ already",
            hint="leave uniform away, or begin with the model as it was before it was pruned",
        )


def watching_bytes(config: ModelConfig, sequences: int, length: int) -> int:
    """Memory of a pass over the blocks that looks at the inputs of o and down."""
    tokens = max(TOKENS_AT_ONCE, length)
    blocks = [
        4 * sum(math.prod(shape) for shape in layer.linear_shapes(config.hidden_size).values())
        + 4 * tokens * 6 * (layer.ffn_width + layer.q_size + config.hidden_size)
        for layer in config.layers
    ]
    return max(blocks) + 4 * sequences * length * config.hidden_size


def _check_reach(loose: int, target: int) -> None:
    if loose < target:
        raise CompressionError(
            f"{target} weights are to go, but only {loose} can: a piece of each kind stays in every layer",
            hint="a smaller ratio or multiple; or heads: query or group",
        )
