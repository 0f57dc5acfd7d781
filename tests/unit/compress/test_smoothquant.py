"""SmoothQuant against the paper's formula, and 8-bit activations with and without it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from gossamer.compress.quantize.smoothquant import SmoothQuant, SmoothQuantOptions, largest, smoothing
from gossamer.errors import NumericalError, ShapeMismatch
from gossamer.formats import Integer
from random_blocks import make_block, make_rotation, make_view

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
FORM = Integer(8, None)


def rounded_per_token(x: Tensor) -> Tensor:
    """Activations [.., in] on a symmetric 8-bit grid for each token."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def test_scales_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 50, 16, generator=generator), torch.randn(8, 16, generator=generator)
    assert torch.equal(largest(x.split(1)), x.abs().amax((0, 1)))
    for alpha in (0.0, 0.3, 0.5, 1.0):
        got = smoothing(largest([x]), weight.abs().amax(0), alpha)
        expected = x.abs().amax((0, 1)).double() ** alpha / weight.abs().amax(0).double() ** (1 - alpha)
        assert torch.allclose(got.double(), expected, rtol=1e-5)
    half = smoothing(largest([x]), weight.abs().amax(0), 0.5)  # then both sides have one and the same range
    assert torch.allclose((x / half).abs().amax((0, 1)), (weight * half).abs().amax(0), rtol=1e-4)


@pytest.mark.parametrize("points", ["norms", "all"])
def test_only_rounding_changes_what_the_block_computes(points: str) -> None:
    block = make_block()
    original = deepcopy(block)
    view = make_view(block, FORM)
    SmoothQuant(SmoothQuantOptions(points=points)).compress(view)
    x, rotation = view.x, make_rotation()
    right = original(x, rotation)
    assert ((view.block(x, rotation) - right).square().sum() / (right - x).square().sum()) < 1e-3
    assert not torch.equal(block.attn_norm.weight, original.attn_norm.weight)
    changed = (view.block.up.weight - original.up.weight * (original.ffn_norm.weight / block.ffn_norm.weight)).abs()
    assert (changed.max() > 0.05) == (points == "all")  # beyond rounding: the rows of up carry a scale


def test_smoothed_activations_lose_less_in_8_bits() -> None:
    """With weights and activations both rounded, as W8A8 runs; without it, one large channel takes all the steps."""
    original = make_block()
    plain, smooth = deepcopy(original), deepcopy(original)
    view = make_view(smooth, FORM)
    SmoothQuant(SmoothQuantOptions()).compress(view)
    for role in ROLES:
        linear = getattr(plain, role)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127.5
        linear.weight.data = (linear.weight / scale).round().clamp(-128, 127) * scale
    x = view.x
    for norm, roles in (("attn_norm", ("q", "k", "v")), ("ffn_norm", ("gate", "up"))):
        lost = []
        for block in (plain, view.block):
            inputs = rounded_per_token(getattr(block, norm)(x))
            lost.append(
                sum(
                    (inputs @ getattr(block, r).weight.T - getattr(original, norm)(x) @ getattr(original, r).weight.T)
                    .square()
                    .sum()
                    for r in roles
                )
            )
        assert lost[1] < 0.5 * lost[0]


def test_an_input_that_is_always_zero_is_left_alone() -> None:
    block = make_block()
    block.attn_norm.weight.zero_()
    view = make_view(block, FORM)
    SmoothQuant(SmoothQuantOptions(points="all")).compress(view)
    assert torch.isfinite(view.block(view.x, make_rotation())).all()


def test_a_channel_without_weights_gets_a_scale_all_the_same() -> None:
    block = make_block()
    for role in ("gate", "up"):
        getattr(block, role).weight[:, 9] = 0
    view = make_view(block, FORM)
    SmoothQuant(SmoothQuantOptions(alpha=0.0)).compress(view)
    assert torch.isfinite(view.block(view.x, make_rotation())).all()


def test_what_it_refuses() -> None:
    with pytest.raises(ShapeMismatch, match="does not divide"):
        SmoothQuant(SmoothQuantOptions()).compress(make_view(make_block(), Integer(8, 40)))
    view = make_view(make_block(), FORM)
    view.x[0, 0, 0] = float("inf")
    with pytest.raises(NumericalError):
        SmoothQuant(SmoothQuantOptions()).compress(view)
    for bad in ({"alpha": 1.5}, {"alpha": -0.1}, {"points": "some"}, {"apha": 0.5}):
        with pytest.raises(ValidationError):
            SmoothQuantOptions.model_validate(bad)
