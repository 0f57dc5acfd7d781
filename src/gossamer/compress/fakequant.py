"""Weights rounded to an integer grid in a forward pass, with gradients as if they were not.

Rounding has no useful gradient. The straight-through estimator (Bengio et al., arXiv 1308.3432) takes that of the
identity in its place; how scales and zero points then learn is derived in LSQ+ (Bhalgat et al., arXiv 2004.09576).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericalError
from ..formats import Codes, Integer


class _FakeQuantize(torch.autograd.Function):
    """(clamp(round(w / s + z)) - z) * s for groups: w [out, groups, columns], s and z [out, groups, 1].

    With q the clamped code and `inside` where nothing was clamped, the straight-through gradients are
    dw = inside,  ds = q - z - inside * w / s,  dz = -s * (1 - inside).
    Weights outnumber everything else in a step of training: as few passes over them as there can be, most in place.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, z: Tensor | None, low: int, high: int) -> Tensor:
        steps = w / s
        free = (steps if z is None else steps + z).round()
        code = free.clamp(low, high)
        inside = free == code
        if z is not None:
            code -= z
        slope = torch.sub(code, steps.mul_(inside), out=free) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, slope, s)
        return code.mul_(s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inside, slope, s = ctx.saved_tensors
        passed = grad * inside
        ds = None if slope is None else (grad * slope).sum(-1, keepdim=True)
        dz = -s * (grad - passed).sum(-1, keepdim=True) if ctx.needs_input_grad[2] else None
        return passed, ds, dz, None, None


class _RoundSteps(torch.autograd.Function):
    """(clamp(round(u + z)) - z) * s for groups: u [out, groups, columns] in steps, s and z [out, groups, 1].

    With q the clamped code and `inside` where nothing was clamped: du = s * inside,  ds = q - z,
    dz = -s * (1 - inside). A scale moves the points of the grid and the weights on it alike, so its gradient is that of
    the value itself, not that of the rounding error.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, s: Tensor, z: Tensor | None, low: int, high: int) -> Tensor:
        free = (u if z is None else u + z).round()
        code = free.clamp(low, high)
        inside = free == code
        if z is not None:
            code -= z
        ctx.save_for_backward(inside, code, s)
        return code * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inside, code, s = ctx.saved_tensors
        ds = (grad * code).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        passed = grad * inside
        dz = -s * (grad - passed).sum(-1, keepdim=True) if ctx.needs_input_grad[2] else None
        return passed.mul_(s), ds, dz, None, None


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return value + (rounded - value).detach() if value.requires_grad else rounded


def stored_grid(scale: Tensor, zero: Tensor | None, form: Integer) -> tuple[Tensor, Tensor]:
    """Scale and zero point as the format stores them, both float32, passing gradients straight through."""
    tiny = torch.finfo(form.scale_dtype).tiny
    stored = straight_through(scale, scale.detach().clamp(min=tiny).to(form.scale_dtype).float())
    if zero is None or form.symmetric:
        return stored, torch.zeros_like(stored)
    return stored, straight_through(zero, zero.detach().round().clamp(*code_range(form)))


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, form: Integer) -> Tensor:
    """A weight [out, in] rounded to its grid, `scale` and `zero` [out, groups]; what `codes_of` would dequantize to."""
    scale, point = stored_grid(scale, zero, form)
    grouped = weight.view(*scale.shape, -1)
    apply: Callable[..., Tensor] = _FakeQuantize.apply
    shift = None if zero is None or form.symmetric else point.unsqueeze(-1)
    return apply(grouped, scale.unsqueeze(-1), shift, *code_range(form)).view(weight.shape)


def round_steps(steps: Tensor, scale: Tensor, zero: Tensor | None, form: Integer) -> Tensor:
    """A weight [out, in], given in steps of its grid and rounded to it; `scale` and `zero` [out, groups].

    What `codes_of_steps` would dequantize to.
    """
    scale, point = stored_grid(scale, zero, form)
    apply: Callable[..., Tensor] = _RoundSteps.apply
    shift = None if zero is None or form.symmetric else point.unsqueeze(-1)
    return apply(steps.view(*scale.shape, -1), scale.unsqueeze(-1), shift, *code_range(form)).view(steps.shape)


@torch.no_grad()
def codes_of_steps(steps: Tensor, scale: Tensor, zero: Tensor | None, form: Integer) -> Codes:
    """Codes of a weight [out, in] given in steps of the grid that `round_steps` rounds to. Raises NumericalError."""
    scale, point = stored_grid(scale.detach(), None if zero is None else zero.detach(), form)
    _require_finite(steps, scale)
    codes = (steps.view(*scale.shape, -1) + point.unsqueeze(-1)).round_().clamp_(*code_range(form))
    return Codes(codes.view(steps.shape).to(torch.int8), scale, None if form.symmetric else point.to(torch.int8))


@torch.no_grad()
def codes_of(weight: Tensor, scale: Tensor, zero: Tensor | None, form: Integer) -> Codes:
    """The codes of a weight [out, in] on the grid that `fake_quantize` rounds to. Raises NumericalError."""
    scale, point = stored_grid(scale.detach(), None if zero is None else zero.detach(), form)
    _require_finite(weight, scale)
    grouped = weight.view(*scale.shape, -1)
    codes = (grouped / scale.unsqueeze(-1) + point.unsqueeze(-1)).round_().clamp_(*code_range(form))
    return Codes(codes.view(weight.shape).to(torch.int8), scale, None if form.symmetric else point.to(torch.int8))


def code_range(form: Integer) -> tuple[int, int]:
    """Smallest and largest code."""
    return -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1


def _require_finite(*tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NumericalError("training diverged: weights or scales are NaN or infinite", hint="lower learning rates")
