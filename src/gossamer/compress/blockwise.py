"""What methods share that learn a block against the original's outputs: where it begins, and the training.

Knows a BlockView and integer grids; knows no method's choice of what to learn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from ..errors import CompressionError
from ..formats import Codes, Format, Integer
from ..model import ModelConfig
from .blockview import BlockView
from .method import BlockQuantizer, QuantizeOptions
from .precision import PRECISION, Precision, in_precision
from .quantize.gptq import GPTQ, GPTQOptions
from .quantize.grid import grid_of, quantize
from .tunedlinear import CELL
from .walk import ENOUGH_SEQUENCES, TOKENS_AT_ONCE

LEAST_JUDGES, JUDGED_SHARE = 2, 1 / 16
"""Calibration sequences that are kept back to judge by, where there are at least eight."""
Weights = Callable[[], Mapping[str, Tensor]]
"""Parameter names of a block (`q.weight`, `attn_norm.weight`) -> what stands in their place, with gradients."""


class LearnOptions(QuantizeOptions):
    """Options of every method that learns block by block."""

    steps: int = Field(default=40, ge=0, le=100_000, description="optimizer steps for each block")
    batch_size: int = Field(default=2, ge=1, le=1024, description="calibration sequences in a step")
    seconds: float | None = Field(
        default=None, gt=0, description="ends a block's training early; the result then depends on the machine's speed"
    )
    precision: Precision = PRECISION


class RoundedOptions(LearnOptions):
    """Options of methods that learn from codes that another method has found."""

    start: Literal["gptq", "rtn"] = Field(default="gptq", description="whose codes and scales the training begins with")


class BlockLearner(BlockQuantizer):
    """A method that learns block by block, with options of this module."""

    options: LearnOptions

    @property
    def precision(self) -> Precision:
        return self.options.precision

    def peak_bytes(self, config: ModelConfig, index: int, sequences: int, length: int) -> int:
        """Memory of Adam over every weight of block `index`, and of the activations of a step."""
        return super().peak_bytes(config, index, sequences, min(self.options.batch_size, sequences) * length)


class RoundedLearner(BlockLearner):
    """One that begins from codes that another method has found, and leaves embedding and head to that one."""

    options: RoundedOptions

    @property
    def ends(self) -> GPTQ | None:
        """GPTQ if that is where it begins."""
        return GPTQ(GPTQOptions(clip=self.options.clip)) if self.options.start == "gptq" else None


def integer_form(form: Format, where: str) -> Integer:
    """The format, which learning needs to be an evenly spaced grid. Raises CompressionError naming the layer."""
    grid = form.grid
    if not isinstance(grid, Integer):
        raise CompressionError(
            f"{where}: learned rounding works on evenly spaced integers, not on {form.name}",
            hint="format: int, or another method for codebooks",
        )
    return grid


@dataclass(frozen=True)
class Start:
    """Where the training of a linear layer begins; float32, scale and zero point [out, groups]."""

    form: Integer
    weight: Tensor
    """[out, in] the original's, moved into the cells of the codes that training starts from."""
    scale: Tensor
    zero: Tensor | None


@torch.no_grad()
def starts_of(view: BlockView, options: RoundedOptions) -> dict[str, Start]:
    """A start for each linear layer: codes by GPTQ, or rounded to nearest, on the inputs as compressed so far.

    Decides the layers as well (`view.put`), so that later ones are rounded on the inputs that they will see.
    """
    found: dict[str, Start] = {}
    for roles in view.points:
        moment = view.hessian(*roles) if options.start == "gptq" else None
        for role in roles:
            form = integer_form(view.form(role), view.name(role))
            weight = getattr(view.block, role).weight.detach().clone()
            codes = _first_codes(weight, form, moment, options)
            view.put(role, codes)
            found[role] = start_from(weight, codes, form)
    return {role: found[role] for role in view.roles}


def start_from(weight: Tensor, codes: Codes, form: Integer) -> Start:
    """A weight [out, in] moved as little as may be into the cells of these codes of it."""
    scale = codes.scale.float()
    grouped, value = weight.view(*scale.shape, -1), codes.dequantize().view(*scale.shape, -1)
    reach = CELL * scale.unsqueeze(-1)
    moved = value + (grouped - value).clamp(-reach, reach)
    return Start(form, moved.view(weight.shape), scale, None if codes.zero is None else codes.zero.float())


def _first_codes(weight: Tensor, form: Integer, moment: Tensor | None, options: RoundedOptions) -> Codes:
    if moment is not None:
        return GPTQ(GPTQOptions(clip=options.clip)).quantize(weight, form, moment)
    return quantize(weight, *grid_of(weight, form, options.clip), form)


class SignDescent(torch.optim.Optimizer):
    """Every parameter moves by the learning rate against the sign of its gradient (arXiv 2309.05516)."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def cosine(done: float) -> float:
    """The share of a learning rate after this share of the steps: from 1 to a twentieth, along half a cosine."""
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """The same from 1 to 0 along a line."""
    return 1 - done


@dataclass(frozen=True)
class Learned:
    """What training a block did; errors as `block_error` gives them."""

    before: float
    after: float


def learn(
    view: BlockView,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    options: LearnOptions,
    decay: Callable[[float], float] = cosine,
    limit: Callable[[], None] = lambda: None,
) -> Learned:
    """Train what `weights` depends on so that the block's outputs approach the original's.

    Learning rates are the optimizer's groups' `rate`, times `decay`; `limit` is called behind each step, to bring
    parameters back into their range. Batches are drawn by the view's generator. The parameters are left at the better
    of the start and the end by `block_error`: never worse than they began.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in params]
    with in_precision(options.precision):
        before = block_error(view, weights)
    began = time.monotonic()
    batches = batches_of(len(view.x), options.batch_size, options.steps, view.generator)
    for step, batch in enumerate(batches):
        done = step / len(batches)
        if options.seconds is not None:
            done = max(done, (time.monotonic() - began) / options.seconds)
            if done >= 1:
                break
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * decay(done)
        with torch.enable_grad():
            with in_precision(options.precision):
                loss = _relative_error(_outputs(view, weights(), batch), view.target[batch]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            limit()
    with in_precision(options.precision):
        after = block_error(view, weights)
    if not after < before:  # NaN is not
        with torch.no_grad():
            for p, kept in zip(params, start, strict=True):
                p.copy_(kept)
        after = before
    return Learned(before, after)


@torch.no_grad()
def block_error(view: BlockView, weights: Weights) -> float:
    """Mean over calibration tokens of |y - t|^2 / |t|^2, with y the block's output and t the original's.

    Of no more than ENOUGH_SEQUENCES: more would take longer than they tell.
    Relative to each token: a few of them carry activations hundreds of times larger than all others, and what reads the
    stream normalizes it.
    """
    fixed, count = weights(), min(len(view.x), ENOUGH_SEQUENCES)
    sums = [
        float(_relative_error(_outputs(view, fixed, batch), view.target[batch]).sum().double())
        for batch in torch.split(torch.arange(count), max(1, TOKENS_AT_ONCE // view.x.shape[1]))
    ]
    return sum(sums) / (count * view.x.shape[1])


def _outputs(view: BlockView, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
    """What the block gives for some sequences [n] with these tensors in place of its parameters."""
    return cast(Tensor, functional_call(view.block, dict(weights), (view.x[batch], view.rotation)))


def _relative_error(y: Tensor, target: Tensor) -> Tensor:
    """[sequences, time]"""
    size = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (y - target).square().sum(-1) / size


def parted(count: int) -> tuple[Tensor, Tensor]:
    """Indices of sequences to train on, and of those to judge by: of fewer than eight, all are both."""
    every = torch.arange(count)
    judges = max(LEAST_JUDGES, int(count * JUDGED_SHARE))
    return (every[:-judges], every[-judges:]) if count >= 8 else (every, every)


def batches_of(count: int, size: int, steps: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of the sequences of each step: each sequence once, in a drawn order, before any comes again."""
    size = min(size, count)
    rounds = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)] or [torch.empty(0).long()])
    return [order[i * size : (i + 1) * size] for i in range(steps)]
