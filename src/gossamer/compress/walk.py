"""One block of a decoder, walked so that every linear layer is compressed on the inputs that it will really see.

The block has four points at which linear layers read the same input: (q, k, v), (o), (gate, up) and (down); without a
gate, the third is (up). At each one the inputs come from layers that are compressed already, so one forward pass serves
both to gather statistics and to carry the activations on.

Knows blocks and activations; knows no file, recipe or method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..model.decoder import Block, Rotation

Compress = Callable[[tuple[str, ...], Tensor | None], None]
"""Called at each point with the roles that share an input and its Hessian [in, in]; puts new weights into the block."""

TOKENS_AT_ONCE = 2048
"""Bounds the temporary memory of a step, whatever the number of calibration sequences."""
ENOUGH_SEQUENCES = 64
"""The error of a block is a mean over no more calibration sequences."""
POSITIONS_AT_ONCE = 256
"""Positions whose logits are in memory at a time, where a loss is computed."""
TOKENS_PER_COLUMN = 16
"""So many of them give a Hessian."""
PANEL = 256
"""Rows of the Hessian summed at a time."""


def walk(block: Block, x: Tensor, rotation: Rotation, compress: Compress) -> None:
    """Compress a block on the residual stream x [sequences, time, hidden], which becomes its output in place.

    The block is used up: its float weights go as soon as they have served.
    """
    chunks = list(slices(x))
    compress(("q", "k", "v"), hessian(block.attn_norm(x[c]) for c in chunks))
    mixed = _fill(x, block.layer.q_size, chunks, lambda c: block.mix(block.attn_norm(x[c]), rotation))
    compress(("o",), hessian(mixed[c] for c in chunks))
    before = x.clone() if block.parallel else x
    for c in chunks:
        x[c] += block.attended(mixed[c])
    del mixed
    first = ("gate", "up") if block.layer.gated else ("up",)
    compress(first, hessian(block.ffn_norm(before[c]) for c in chunks))
    gated = _fill(x, block.layer.ffn_width, chunks, lambda c: block.gated(block.ffn_norm(before[c])))
    for role in ("q", "k", "v", "o", *first):  # they have served; `down` needs the memory
        delattr(block, role)
    compress(("down",), hessian(gated[c] for c in chunks))
    for c in chunks:
        x[c] += block.fed(gated[c])


def advance(block: Block, x: Tensor, rotation: Rotation, see: Callable[[str, Tensor], None] | None = None) -> None:
    """Carry the residual stream through a block that is compressed already, by the same arithmetic as `walk`.

    `see` is given the inputs [some sequences, time, in] of `o` and `down` as they come.
    """
    for c in slices(x):
        mixed = block.mix(block.attn_norm(x[c]), rotation)
        attended = block.attended(mixed)
        if not block.parallel:
            x[c] += attended
        gated = block.gated(block.ffn_norm(x[c]))
        fed = block.fed(gated)
        x[c] += attended.add_(fed) if block.parallel else fed
        if see is not None:
            see("o", mixed)
            see("down", gated)


def hessian(inputs: Iterator[Tensor]) -> Tensor:
    """Sum of X^T X [in, in] over inputs [..., in]."""
    total: Tensor | None = None
    for x in inputs:
        flat = x.reshape(-1, x.shape[-1])
        columns = flat.shape[1]
        if total is None:
            total = torch.zeros(columns, columns)
        for start in range(0, columns, PANEL):  # the product is symmetric: half of it is enough
            total[start : start + PANEL, start:].addmm_(flat[:, start : start + PANEL].T, flat[:, start:])
    assert total is not None
    for start in range(0, total.shape[0], PANEL):  # the other half, without another matrix of this size
        stop = start + PANEL
        total[stop:, start:stop] = total[start:stop, stop:].T
        corner = total[start:stop, start:stop]
        corner.copy_(torch.triu(corner) + torch.triu(corner, diagonal=1).T)
    return total


def _fill(x: Tensor, width: int, chunks: list[slice], compute: Callable[[slice], Tensor]) -> Tensor:
    """[sequences, time, width] computed a few sequences at a time."""
    out = torch.empty(*x.shape[:2], width)
    for c in chunks:
        out[c] = compute(c)
    return out


def slices(x: Tensor) -> Iterator[slice]:
    """Of x [sequences, time, ...], a few sequences at a time."""
    step = max(1, TOKENS_AT_ONCE // x.shape[1])
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))
