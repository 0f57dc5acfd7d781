"""OmniQuant: scaling that changes nothing in float, clipping by its formula, never worse than rounding."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.func import functional_call

from gossamer.compress.blockview import BlockView
from gossamer.compress.blockwise import block_error
from gossamer.compress.quantize.omniquant import Clipping, OmniQuant, OmniQuantOptions, Scales
from gossamer.formats import Integer
from random_blocks import make_block, make_inputs, make_rotation, make_view


def learned(form: Integer, bias: bool = False, **options: Any) -> BlockView:
    view = make_view(make_block(bias=bias), form)
    OmniQuant(OmniQuantOptions(**options)).compress(view)
    return view


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_scaling_and_clipping_beat_rounding_with_ranges_of_least_error(bits: int, symmetric: bool) -> None:
    form = Integer(bits, 32, symmetric)
    rounding = block_error(learned(form, steps=0, clip="mse"), dict)
    trained = block_error(learned(form, steps=40, clip="mse"), dict)
    assert trained <= rounding
    assert bits == 4 or trained < 0.9 * rounding


def test_scaling_helps_beyond_clipping() -> None:
    form = Integer(3, 32)
    clipping = block_error(learned(form, steps=40, scale_rate=0.0), dict)
    assert block_error(learned(form, steps=40), dict) < clipping


def test_no_training_ends_worse_than_it_began() -> None:
    form = Integer(3, 16)
    before = block_error(learned(form, steps=0), dict)
    for options in ({"steps": 1}, {"steps": 3, "scale_rate": 50.0}, {"steps": 3, "clip_rate": 1e4}):
        assert block_error(learned(form, **options), dict) <= before * (1 + 1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_scaled_and_folded_blocks_compute_what_the_block_computed(bias: bool) -> None:
    block = make_block(bias=bias)
    view = make_view(deepcopy(block), Integer(4, 32))
    scales = Scales(view)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for logs in scales.logs:
            logs.normal_(0, 0.5, generator=generator)
        x, rotation = make_inputs(), make_rotation()
        wanted = block(x, rotation)
        scaled = functional_call(view.block, scales.scaled(), (x, rotation))
        torch.testing.assert_close(scaled, wanted, rtol=1e-4, atol=1e-4)
        scales.fold()
        torch.testing.assert_close(view.block(x, rotation), wanted, rtol=1e-3, atol=1e-3)
        for role in ("q", "o", "up", "down"):  # and it is another block
            assert not torch.allclose(getattr(view.block, role).weight, getattr(block, role).weight, rtol=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clipped_grid_covers_its_part_of_the_range(symmetric: bool) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    clipping = Clipping(weight, Integer(3, 16, symmetric), "none")
    with torch.no_grad():
        for part, share in zip(clipping.parts, (0.8, 0.6), strict=False):
            part.fill_(torch.logit(torch.tensor(share)))
        scale, zero = clipping.grid(weight)
    groups = weight.view(5, 2, 16)
    if symmetric:
        torch.testing.assert_close(scale * 3.5, 0.8 * groups.abs().amax(-1))
        assert zero is None
    else:
        assert zero is not None
        torch.testing.assert_close((-4 - zero) * scale, 0.6 * groups.amin(-1))
        torch.testing.assert_close((3 - zero) * scale, 0.8 * groups.amax(-1))


def test_equal_seeds_give_equal_bytes() -> None:
    form = Integer(3, 32, symmetric=False)
    first, again = learned(form, steps=10, bias=True), learned(form, steps=10, bias=True)
    for name, p in first.block.named_parameters():
        assert torch.equal(p, again.block.get_parameter(name))
    for role, codes in first.decided.items():
        assert torch.equal(form.unpack(form.pack(codes)), getattr(first.block, role).weight)


def test_a_layer_of_zeros_stays_zero() -> None:
    block = make_block()
    block.v.weight.zero_()
    view = make_view(block, Integer(4, 32))
    OmniQuant(OmniQuantOptions(steps=5)).compress(view)
    assert torch.equal(view.block.v.weight, torch.zeros_like(view.block.v.weight))
    assert all(torch.isfinite(p).all() for p in view.block.parameters())


@pytest.mark.parametrize("options", [{"clip_rate": -1.0}, {"scale_rates": 0.1}, {"seconds": 0.0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OmniQuantOptions(**options)
