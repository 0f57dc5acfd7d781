"""AWQ against a search written in float64 here, and against rounding alone on inputs with outlier channels."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gossamer.compress.blockview import POINTS
from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize.awq import AWQ, AWQOptions, candidates, clipped, output_error, statistics
from gossamer.compress.quantize.fold import foldable
from gossamer.compress.quantize.grid import grid_of, quantize
from gossamer.compress.quantize.rtn import RTN
from gossamer.errors import NumericalError, ShapeMismatch
from gossamer.formats import Codebook, Format, Integer
from random_blocks import make_block, make_inputs, make_rotation, make_view
from random_blocks import output_error as block_error

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def compressed(form: Format, **options: Any):
    """A block after AWQ, the block before it, and its inputs."""
    block = make_block()
    original = deepcopy(block)
    view = make_view(block, form)
    AWQ(AWQOptions(**options)).compress(view)
    assert set(view.decided) == set(ROLES)
    for role in ROLES:
        assert torch.equal(view.decided[role].dequantize(), getattr(view.block, role).weight)
    return view.block, original, view.x


def rounded(form: Format, clip: str = "none"):
    block = make_block()
    for role in ROLES:
        linear = getattr(block, role)
        linear.weight.data = RTN(QuantizeOptions(clip=clip)).quantize(linear.weight, form, None).dequantize()
    return block


def rounded_in_float64(weight: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Nearest values on symmetric grids of groups, scales in bfloat16."""
    groups = weight.double().view(len(weight), -1, size)
    scale = (groups.abs().amax(-1, keepdim=True) / (2**bits - 1) * 2).bfloat16().double()
    return ((groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view(weight.shape)


def test_the_error_that_is_searched_is_the_layers_own() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 64, generator=generator), torch.randn(200, 64, generator=generator) * 3
    scale = torch.rand(64, generator=generator) + 0.5
    moment, size = statistics(x.view(4, 50, 64).split(1))
    value = rounded_in_float64(weight * scale, 4, 16) / scale.double()
    expected = ((x.double() @ (value - weight.double()).T) ** 2).sum()
    assert output_error(weight, scale, Integer(4, 16), moment) == pytest.approx(float(expected), rel=1e-3)
    assert torch.allclose(size, x.abs().mean(0), rtol=1e-5)


def test_candidates_begin_with_rounding_alone_and_follow_the_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(32, generator=generator) + 0.1
    weights = [torch.randn(rows, 32, generator=generator) for rows in (4, 8)]
    found = list(candidates(size, weights, 10))
    assert len(found) == 22
    assert torch.equal(found[0], torch.ones(32))
    spread = torch.cat(weights).abs().mean(0)
    expected = [size**a for a in (0.0, 0.1, 0.5, 1.0)] + [size**a / spread ** (1 - a) for a in (0.0, 0.3, 1.0)]
    for scale, right in zip([found[i] for i in (0, 1, 5, 10, 11, 14, 21)], expected, strict=True):
        ratio = scale / right
        assert torch.allclose(ratio, ratio[0].expand(32), rtol=1e-4)
        assert abs(float(scale.log().mean())) < 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_point_takes_the_best_of_its_candidates(bits: int, symmetric: bool) -> None:
    form = Integer(bits, 32, symmetric)
    block = make_block()
    view = make_view(block, form)
    for roles in POINTS:
        moment, size = statistics(view.inputs(roles[0]))
        weights = [getattr(block, role).weight.clone() for role in roles]
        tried = []
        for candidate in candidates(size, weights, 20):
            scale = foldable(block, roles, candidate)
            tried.append(sum(output_error(w, scale, form, moment) for w in weights))
        AWQ(AWQOptions())._scale(view, roles)
        folded = getattr(block, roles[0]).weight / weights[0]  # every row holds the scale
        scale = folded.median(0).values
        assert sum(output_error(w, scale, form, moment) for w in weights) == pytest.approx(min(tried), rel=0.02)
        assert min(tried) <= tried[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_it_loses_less_of_a_blocks_output_than_rounding_where_channels_stand_out(bits: int, symmetric: bool) -> None:
    form = Integer(bits, 32, symmetric)
    x = make_inputs()
    plain = block_error(rounded(form), make_block(), x)
    scaled, original, _ = compressed(form, clip="none")
    assert block_error(scaled, original, x) < 0.8 * plain
    both, original, _ = compressed(form, clip="mse")
    assert block_error(both, original, x) < 0.8 * plain
    repaired, original, _ = compressed(form, rounding="gptq")
    assert block_error(repaired, original, x) < 0.8 * block_error(scaled, original, x)


def test_it_works_on_codebooks_and_on_a_grid_for_each_layer() -> None:
    x = make_inputs()
    nf4 = Codebook("nf4", 32, False)
    scaled, original, _ = compressed(nf4)
    assert block_error(scaled, original, x) < block_error(rounded(nf4), original, x)
    block = make_block()
    view = make_view(block, {role: Integer(3 if role in "qk" else 4, 32) for role in ROLES})
    AWQ(AWQOptions()).compress(view)
    assert view.decided["q"].codes.abs().max() <= 4 < view.decided["v"].codes.abs().max()


def test_clipping_takes_the_best_range_of_every_group_and_no_row_gets_worse() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 96, generator=generator) ** 3
    x = torch.randn(300, 96, generator=generator) * (torch.rand(96, generator=generator) * 3)
    form = Integer(3, 96)  # one group: its share is the whole row's output
    codes = clipped(weight, form, x.T @ x)
    grids = [form.fit(weight.amin(1, keepdim=True) * s, weight.amax(1, keepdim=True) * s) for s in (1.0, *form.shares)]
    errors = [((x @ (quantize(weight, *grid, form).dequantize() - weight).T) ** 2).sum(0) for grid in grids]
    found = ((x @ (codes.dequantize() - weight).T) ** 2).sum(0)
    assert torch.allclose(found, torch.stack(errors).amin(0), rtol=1e-3)
    assert found.sum() < 0.9 * errors[0].sum()
    for size in (16, 32):
        form = Integer(3, size)
        plain = quantize(weight, *grid_of(weight, form), form)
        before, after = (
            ((x @ (c.dequantize() - weight).T) ** 2).sum(0) for c in (plain, clipped(weight, form, x.T @ x))
        )
        assert (after <= before * (1 + 1e-3)).all()
        assert after.sum() < 0.95 * before.sum()


def test_an_input_that_is_always_zero_is_left_alone() -> None:
    block = make_block()
    block.v.weight.zero_()
    view = make_view(block, Integer(4, 32))
    norm = block.attn_norm.weight.clone()
    AWQ(AWQOptions()).compress(view)
    assert torch.equal(view.decided["v"].dequantize(), torch.zeros(32, 64))
    assert torch.isfinite(view.block(view.x, make_rotation())).all()
    assert not torch.equal(norm, view.block.attn_norm.weight)


def test_what_it_refuses() -> None:
    with pytest.raises(ShapeMismatch, match="does not divide"):
        AWQ(AWQOptions()).compress(make_view(make_block(), Integer(4, 40)))
    view = make_view(make_block(), Integer(4, 32))
    view.x[0, 0, 0] = float("nan")
    with pytest.raises(NumericalError):
        AWQ(AWQOptions()).compress(view)
    for bad in ({"steps": 0}, {"rounding": "hqq"}, {"clip": "best"}, {"alpha": 0.5}):
        with pytest.raises(ValidationError):
            AWQOptions.model_validate(bad)
