"""HQQ against an exhaustive search of grids, and its thresholding against the problem that it solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize.hqq import HQQ, HQQOptions, shrink
from gossamer.compress.quantize.rtn import RTN
from gossamer.errors import CompressionError, NumericalError, ShapeMismatch
from gossamer.formats import Codebook, Integer


def lost(weight: torch.Tensor, value: torch.Tensor, norm: float, columns: int) -> torch.Tensor:
    """Sum of |error|^norm of each group, in float64."""
    return (weight.double() - value.double()).abs().pow(norm).view(len(weight), -1, columns).sum(-1)


def heavy_weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    outliers = torch.rand(rows, columns, generator=generator) < 0.03
    return torch.where(outliers, weight * 5, weight) * 0.05


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_loses_more_than_rounding_on_the_grid_that_it_begins_from(
    bits: int, symmetric: bool, clip: str
) -> None:
    weight = heavy_weights(32, 128, seed=bits)
    form = Integer(bits, 32, symmetric)
    hqq = HQQ(HQQOptions(bits=bits, clip=clip)).quantize(weight, form, None)
    rtn = RTN(QuantizeOptions(bits=bits, clip=clip)).quantize(weight, form, None)
    before, after = (lost(weight, codes.dequantize(), 0.7, 32) for codes in (rtn, hqq))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < (0.97 if bits < 8 else 1.0001) * before.sum()  # 8 bits leave nothing to gain


def best_by_search(group: np.ndarray, bits: int, symmetric: bool, norm: float) -> float:
    """Least sum of |error|^norm over a fine grid of scales and all zero points, every weight to its nearest value."""
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    widest = np.abs(group).max() / (2 ** (bits - 1) - 0.5)
    scales = np.linspace(0.2, 1.2, 101) * (widest if symmetric else (group.max() - group.min()) / (2**bits - 1))
    zeros = np.array([0]) if symmetric else codes
    values = (codes[None, None] - zeros[:, None, None])[..., None, :] * scales[None, :, None, None]
    return float((np.abs(values - group[None, None, :, None]).min(-1) ** norm).sum(-1).min())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_comes_near_the_best_grid_that_an_exhaustive_search_finds(bits: int, symmetric: bool) -> None:
    weight = heavy_weights(16, 32, seed=7)
    codes = HQQ(HQQOptions(bits=bits, iterations=50)).quantize(weight, Integer(bits, 32, symmetric), None)
    start = RTN(QuantizeOptions(bits=bits)).quantize(weight, Integer(bits, 32, symmetric), None)
    found = lost(weight, codes.dequantize(), 0.7, 32).sum()
    begun = lost(weight, start.dequantize(), 0.7, 32).sum()
    best = sum(best_by_search(row.double().numpy(), bits, symmetric, 0.7) for row in weight)
    assert found >= best * 0.97  # the search's scales are a grid, too
    assert begun - found > 0.5 * (begun - best)


def test_the_threshold_is_the_minimum_that_it_stands_for() -> None:
    x = torch.linspace(-2, 2, 41)
    e = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for beta in (5.0, 10.0, 40.0):
        objective = e.abs().pow(0.7) * 0.7**-1 + beta / 2 * (x.double()[:, None] - e) ** 2
        right = e[objective.argmin(1)]
        got = shrink(x, beta, 0.7).double()
        far = x.abs() > 2.5 * beta ** (-1 / 1.3)  # nearer, the one step of the iteration is only a thresholding
        assert (got - right).abs()[far].max() < 0.05
        assert (got.abs() <= x.double().abs()).all()
        assert (got[x.abs() < 0.5 * beta ** (-1 / 1.3)] == 0).all()


def test_weights_on_the_grid_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(3)
    form = Integer(4, 16)
    codes = torch.randint(-8, 8, (8, 64), generator=generator)
    codes[:, ::16], codes[:, 1::16] = -8, 7
    weight = codes.float() * 0.125
    got = HQQ(HQQOptions(iterations=40, clip="mse")).quantize(weight, form, None)
    assert (got.dequantize() - weight).abs().max() <= 0.125 / 2


def test_zeros_and_rows_of_many_slices() -> None:
    weight = torch.zeros(4, 64)
    for symmetric in (True, False):
        codes = HQQ(HQQOptions()).quantize(weight, Integer(4, 32, symmetric), None)
        assert torch.equal(codes.dequantize(), weight)
        assert (codes.scale > 0).all()


def test_rows_do_not_know_each_other() -> None:
    weight = heavy_weights(6, 64, seed=1)
    method, form = HQQ(HQQOptions()), Integer(3, 32, False)
    whole = method.quantize(weight, form, None).dequantize()
    assert torch.equal(whole, torch.cat([method.quantize(row, form, None).dequantize() for row in weight.split(1)]))


def test_what_it_refuses() -> None:
    with pytest.raises(ShapeMismatch, match="does not divide"):
        HQQ(HQQOptions()).quantize(torch.ones(2, 48), Integer(4, 32), None)
    with pytest.raises(CompressionError, match="hqq moves the grid of integers"):
        HQQ(HQQOptions()).quantize(torch.ones(2, 64), Codebook("nf4", 32, False), None)
    with pytest.raises(NumericalError):
        HQQ(HQQOptions()).quantize(torch.tensor([[-2e38, 2e38] * 32]), Integer(4, 32, False), None)
    for bad in ({"norm": 1.0}, {"beta": 0.0}, {"growth": 0.5}, {"iterations": 0}, {"iteration": 3}):
        with pytest.raises(ValidationError):
            HQQOptions.model_validate(bad)
