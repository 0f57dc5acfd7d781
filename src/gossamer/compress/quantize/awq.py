"""AWQ: input channels that carry large activations get finer steps, by scales folded into the layers before.

Activation-aware weight quantization (Lin et al., arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...formats import Codes, Format
from ...model import ModelConfig
from ..blockview import BlockView
from ..method import BlockQuantizer, QuantizeOptions
from ..walk import TOKENS_AT_ONCE, hessian
from .fold import Roles, carries, fold, foldable
from .gptq import GPTQ, GPTQOptions
from .grid import grid_of, quantize

TINY = 1e-4
"""Least size of a channel, as a share of their mean: one that is never used gets a scale all the same."""


class AWQOptions(QuantizeOptions):
    clip: Literal["none", "mse"] = Field(
        "mse", description="mse: shrink each group's range to the least squared error of its share of the output"
    )
    steps: int = Field(20, ge=1, le=1000, description="exponents tried between 0 and 1")
    rounding: Literal["rtn", "gptq"] = Field("rtn", description="what rounds the scaled weights")
    act_order: bool = Field(True, description="gptq: process columns by falling importance")
    damping: float = Field(0.01, gt=0, le=1, description="gptq: share of the mean diagonal added to the Hessian")


class AWQ(BlockQuantizer):
    """Searches the scale of each point of a block, folds all of them, then rounds its layers one point after another.

    Candidates are s = mean|x|^a, and the same over mean|W|^(1 - a), for exponents a from 0 to 1. The one is taken that
    gives the least squared error of the outputs of the layers that read x, rounded to nearest; s = 1 is among them, so
    by that measure no point does worse than by rounding alone.
    """

    name = "awq"
    Options = AWQOptions
    options: AWQOptions

    def compress(self, view: BlockView) -> None:
        """Fold, then decide every linear layer of a block. Raises NumericalError, ShapeMismatch."""
        for roles in view.points:
            self._scale(view, roles)
        for roles in view.points:
            self._decide(view, roles)

    def peak_bytes(self, config: ModelConfig, index: int, sequences: int, length: int) -> int:
        """Squares of the widest input and a few copies of the largest weight, besides a step's activations."""
        layer = config.layers[index]
        shapes = list(layer.linear_shapes(config.hidden_size).values())
        square = max(columns for _, columns in shapes) ** 2
        weight = max(2 * layer.ffn_width * config.hidden_size, layer.q_size * config.hidden_size)
        activations = 6 * max(TOKENS_AT_ONCE, length) * (layer.ffn_width + layer.q_size + config.hidden_size)
        return 4 * (3 * square + 6 * weight + activations)

    def _scale(self, view: BlockView, roles: Roles) -> None:
        """Find and fold the scale of the input that these roles share."""
        weights = [getattr(view.block, role).weight for role in roles]
        forms = [view.form(role) for role in roles]
        moment, size = statistics(view.inputs(roles[0]))
        if not carries(view, roles, size):
            return
        best, least = torch.ones_like(size), float("inf")
        for candidate in candidates(size, weights, self.options.steps):
            scale = foldable(view.block, roles, candidate)
            lost = sum(output_error(w, scale, form, moment) for w, form in zip(weights, forms, strict=True))
            if lost < least:
                best, least = scale, lost
        fold(view.block, roles, best)

    def _decide(self, view: BlockView, roles: Roles) -> None:
        """Round the layers of one point on the inputs that they will really see; those of one format as one weight."""
        moment = view.hessian(*roles)
        for form in dict.fromkeys(view.form(role) for role in roles):
            alike = [role for role in roles if view.form(role) == form]
            weights = [getattr(view.block, role).weight for role in alike]
            codes = self._rounded(torch.cat(weights), form, moment)
            for role, part in zip(alike, codes.split([len(w) for w in weights]), strict=True):
                view.put(role, part)

    def _rounded(self, weight: Tensor, form: Format, moment: Tensor) -> Codes:
        o = self.options
        if o.rounding == "gptq":
            return GPTQ(GPTQOptions(clip=o.clip, act_order=o.act_order, damping=o.damping)).quantize(
                weight, form, moment
            )
        if o.clip == "none":
            return quantize(weight, *grid_of(weight, form), form)
        return clipped(weight, form, moment)


def statistics(inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """X^T X [in, in] and the mean of |x| [in] over inputs X [.., in]."""
    sums, counts = [], []

    def watched() -> Iterator[Tensor]:
        for x in inputs:
            flat = x.reshape(-1, x.shape[-1])
            sums.append(flat.abs().sum(0))
            counts.append(len(flat))
            yield flat

    moment = hessian(watched())
    return moment, torch.stack(sums).sum(0) / sum(counts)


def candidates(size: Tensor, weights: list[Tensor], steps: int) -> Iterator[Tensor]:
    """Scales [in] to try, 1 first, for channels of mean activation `size` [in] in front of weights [out, in]."""
    size = size.clamp(min=TINY * float(size.mean()))
    spread = torch.cat(weights).abs().mean(0)
    spread = spread.clamp(min=max(TINY * float(spread.mean()), torch.finfo(torch.float32).tiny))
    yield torch.ones_like(size)
    for step in range(1, steps + 1):
        yield _centered(size.pow(step / steps))
    for step in range(steps + 1):
        yield _centered(size.pow(step / steps) / spread.pow(1 - step / steps))


def _centered(scale: Tensor) -> Tensor:
    """The same scale with a geometric mean of 1: a common factor changes nothing but the numbers' range."""
    return scale / scale.log().mean().exp()


def output_error(weight: Tensor, scale: Tensor, form: Format, moment: Tensor) -> float:
    """tr(E M E^T) with E = round(W diag(s)) / diag(s) - W: squared error of outputs, M [in, in] of the inputs."""
    scaled = weight * scale
    error = quantize(scaled, *grid_of(scaled, form), form).dequantize().div_(scale).sub_(weight)
    return float(((error @ moment) * error).sum())


def clipped(weight: Tensor, form: Format, moment: Tensor) -> Codes:
    """Codes of a weight [out, in], each group's range shrunk to the least error of its share of the output.

    A group's share is its columns' sum over the inputs, whose second moment is a corner of M [in, in]. A row in which
    the shares add up to a larger error than it has with its full ranges keeps those.
    """
    scale, zero = grid_of(weight, form)
    plain = quantize(weight, scale, zero, form)
    groups = weight.view(*scale.shape, -1)
    size = groups.shape[-1]
    corners = torch.stack([moment[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)])
    low, high = groups.amin(-1), groups.amax(-1)
    least = _shares(groups, scale, zero, form, corners)
    for share in form.shares:
        narrow, point = form.fit(low * share, high * share)
        lost = _shares(groups, narrow, point, form, corners)
        better = lost < least
        least = torch.where(better, lost, least)
        scale, zero = torch.where(better, narrow, scale), torch.where(better, point, zero)
    codes = quantize(weight, scale, zero, form)
    worse = _row_errors(weight, codes, moment) > _row_errors(weight, plain, moment)
    return quantize(
        weight,
        torch.where(worse[:, None], plain.scale, scale),
        zero if plain.zero is None else torch.where(worse[:, None], plain.zero.float(), zero),
        form,
    )


def _shares(groups: Tensor, scale: Tensor, zero: Tensor, form: Format, corners: Tensor) -> Tensor:
    """Squared error [out, groups] of each group's part of the output; corners of the second moment [groups, g, g]."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    error = (form.value(form.round(groups, scale, zero), scale, zero) - groups).transpose(0, 1)  # [groups, out, g]
    return (torch.bmm(error, corners) * error).sum(-1).T


def _row_errors(weight: Tensor, codes: Codes, moment: Tensor) -> Tensor:
    """Squared error [out] of each row's output."""
    error = codes.dequantize() - weight
    return ((error @ moment) * error).sum(1)
