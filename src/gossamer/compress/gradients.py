"""How much the loss depends on each weight: one backward pass over the calibration, a block at a time.

The loss is the original model's mean cross-entropy of the next token over a sequence. What is kept of a block's
gradients is a summary's affair: here the mean over the sequences of their squares, the diagonal of the empirical Fisher
information (as in SqueezeLLM, arXiv 2306.07629). The inputs of all blocks wait on disk; memory holds one block, its
gradient, and two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.safetensors_io import SafetensorsFile, whole, write_safetensors
from ..errors import NumericalError
from ..model.decoder import softcap
from .walk import POSITIONS_AT_ONCE, advance

if TYPE_CHECKING:
    from .units import Units

STREAM = "gradient-stream"
Progress = Callable[[str, int, int], None]


def gradient_unit(i: int) -> str:
    """Name of the unit that holds a summary of block i's gradients."""
    return f"gradient-{i:04d}"


class Summary(Protocol):
    """What is kept of a block's gradients; it is made from role -> weight [out, in] and the number of sequences."""

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Role -> gradient [out, in] of one sequence's loss."""

    def tensors(self) -> dict[str, Tensor]:
        """What the block's unit holds."""


class Squares:
    """Role -> mean squared gradient [out, in]."""

    def __init__(self, weights: Mapping[str, Tensor], sequences: int) -> None:
        self.sequences = sequences
        self.squares = {role: torch.zeros_like(weight, requires_grad=False) for role, weight in weights.items()}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        for role, gradient in gradients.items():
            self.squares[role].addcmul_(gradient, gradient, value=1 / self.sequences)

    def tensors(self) -> dict[str, Tensor]:
        return self.squares


def measure(
    units: Units,
    tokens: Tensor,
    progress: Progress,
    summarize: Callable[[Mapping[str, Tensor], int], Summary] = Squares,
) -> None:
    """Make the gradient units of all blocks that have none, from the last block to the first.

    A killed run goes on at the block where it stopped, after one more forward pass. Raises NumericalError.
    """
    source = units.source
    count = source.config.num_layers
    at = int(units.notes(STREAM)["block"]) if units.is_done(STREAM) else count
    if at == 0:
        return
    rotation = source.rotation(tokens.shape[1])
    x = source.embed(tokens)
    for i in range(at):
        progress("following the original forwards", i, count)
        write_safetensors(_inputs(units, i), [whole("x", x)])
        if i + 1 < at or at == count:
            with torch.no_grad():
                advance(source.block(i), x, rotation)
    if at == count:
        slope = _of_loss(units, x, tokens)
    else:
        slope = units.open(STREAM).read("slope")
    del x
    for i in reversed(range(at)):
        progress("following the loss backwards", count - 1 - i, count)
        block = source.block(i)
        x = SafetensorsFile(_inputs(units, i)).read("x")
        roles = source.config.layers[i].linear_shapes(source.config.hidden_size)
        weights = {role: getattr(block, role).weight.requires_grad_() for role in roles}
        summary = summarize({role: weight.detach() for role, weight in weights.items()}, len(x))
        for s in range(len(x)):
            leaf = x[s : s + 1].requires_grad_()
            output: Any = block(leaf, rotation)
            output.backward(slope[s : s + 1])
            summary.add({role: _gradient(weight) for role, weight in weights.items()})
            for weight in weights.values():
                weight.grad = None
            slope[s] = _gradient(leaf)[0]
        found = summary.tensors()
        if not all(torch.isfinite(tensor).all() for tensor in found.values()):
            raise NumericalError(f"the gradient of block {i}'s weights is not finite")
        if not units.is_done(gradient_unit(i)):  # or a kill came between the two: it is what was found again
            units.write(gradient_unit(i), found, {})
        units.write(STREAM, {"slope": slope}, {"block": i}, file=f"{STREAM}-{i:04d}")
        _inputs(units, i).unlink()
    progress("following the loss backwards", count, count)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _inputs(units: Units, i: int) -> Path:
    return units.folder / f"inputs-{i:04d}.safetensors"


def _of_loss(units: Units, x: Tensor, tokens: Tensor) -> Tensor:
    """Gradient [sequences, time, hidden] of each sequence's mean cross-entropy by the last block's outputs x."""
    source = units.source
    norm, head = source.norm("final_norm"), source.head()
    slope = torch.zeros_like(x)
    time = tokens.shape[1] - 1
    for s in range(len(x)):
        for start in range(0, time, POSITIONS_AT_ONCE):
            part = slice(start, min(start + POSITIONS_AT_ONCE, time))
            leaf = x[s, part].clone().requires_grad_()
            wanted = tokens[s, part.start + 1 : part.stop + 1]
            logits = softcap(F.linear(norm(leaf), head), source.config.final_softcap)
            loss: Any = F.cross_entropy(logits, wanted, reduction="sum") / time
            loss.backward()
            assert leaf.grad is not None
            slope[s, part] = leaf.grad
    return slope
