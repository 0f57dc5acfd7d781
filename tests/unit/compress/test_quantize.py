"""RTN, GPTQ and their grid against formulas in float64 written here, on random inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize import gptq as gptq_module
from gossamer.compress.quantize.gptq import GPTQ, GPTQOptions, inverse_factor
from gossamer.compress.quantize.grid import grid_of, quantize
from gossamer.compress.quantize.rtn import RTN
from gossamer.compress.walk import hessian
from gossamer.errors import NumericalError, ShapeMismatch
from gossamer.formats import Integer

Fit = Callable[[np.ndarray, slice], tuple[np.ndarray, np.ndarray]]


def inputs(columns: int, tokens: int, seed: int) -> torch.Tensor:
    """Correlated inputs, as a real layer has them."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    return torch.randn(tokens, columns, generator=g) @ mix + 0.1 * torch.randn(tokens, columns, generator=g)


def nearest_by_search(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Value of the nearest grid point of every weight, by trying them all in float64."""
    points = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = (points[None, None, None] - zero[..., None, None]) * scale[..., None, None]
    grouped = weight.reshape(*scale.shape, -1)
    best = np.abs(values - grouped[..., None]).argmin(-1)
    return np.take_along_axis(np.broadcast_to(values, (*grouped.shape, len(points))), best[..., None], -1)[..., 0]


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([8, 16, None]),
    symmetric=st.booleans(),
    clip=st.sampled_from(["none", "mse"]),
    seed=st.integers(0, 10_000),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_rtn_takes_the_nearest_point_of_its_grid(
    bits: int, group_size: int | None, symmetric: bool, clip: str, seed: int
) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    form = Integer(bits, group_size, symmetric)
    codes = RTN(QuantizeOptions(bits=bits, clip=clip)).quantize(weight, form, None)
    zero = torch.zeros_like(codes.scale) if codes.zero is None else codes.zero
    expected = nearest_by_search(weight.double().numpy(), codes.scale.double().numpy(), zero.double().numpy(), bits)
    got = codes.dequantize().double().numpy().reshape(expected.shape)
    distance = np.abs(weight.double().numpy().reshape(expected.shape) - got)
    best = np.abs(weight.double().numpy().reshape(expected.shape) - expected)
    assert (distance <= best * (1 + 1e-5) + 1e-6).all()  # ties may fall either way
    assert torch.equal(codes.scale, codes.scale.bfloat16().float())


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipping_by_squared_error_never_loses_to_the_full_range_in_any_group(
    bits: int, symmetric: bool, weighed: bool
) -> None:
    g = torch.Generator().manual_seed(bits)
    light, heavy = torch.randn(2, 256, 512, generator=g)
    weight = torch.cat([light, heavy**3])  # the tails, that is
    importance = torch.rand(512, generator=g) ** 4 if weighed else None
    form = Integer(bits, 32, symmetric)

    def lost(clip: str) -> torch.Tensor:
        error = quantize(weight, *grid_of(weight, form, clip, importance), form).dequantize().double() - weight
        return (error**2 * (1.0 if importance is None else importance)).view(512, 16, 32).sum(-1)

    assert (lost("mse") <= lost("none") * (1 + 1e-5)).all()
    if bits < 8:  # where steps are coarse, a part of the groups gains
        assert lost("mse").sum() < 0.99 * lost("none").sum()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 32)
    for symmetric in (True, False):
        codes = RTN(QuantizeOptions()).quantize(weight, Integer(4, 16, symmetric), None)
        assert torch.equal(codes.dequantize(), weight)
        assert (codes.scale > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_below_the_smallest_scale_become_zero(symmetric: bool) -> None:
    weight = torch.full((2, 32), 1e-44)  # its scale is less than half of the smallest bfloat16
    codes = RTN(QuantizeOptions()).quantize(weight, Integer(4, 16, symmetric), None)
    assert torch.equal(codes.dequantize(), torch.zeros(2, 32))
    assert (codes.scale > 0).all()  # a reader may divide by it


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_finite_weights_that_overflow_their_grid_are_a_typed_error_with_the_numbers(bits: int, clip: str) -> None:
    weight = torch.ones(2, 32)
    weight[0, :2] = torch.tensor([-2e38, 2e38])  # a range of 4e38, and float32 ends at 3.4e38
    for method in (
        RTN(QuantizeOptions(bits=bits, clip=clip)),
        GPTQ(GPTQOptions(bits=bits, clip=clip)),
        GPTQ(GPTQOptions(bits=bits, clip=clip, act_order=False)),
    ):
        with pytest.raises(NumericalError, match=r"-2e\+38 to 2e\+38") as caught:
            method.quantize(weight, Integer(bits, 16, symmetric=False), torch.eye(32))
        assert caught.value.hint
    assert torch.isfinite(RTN(QuantizeOptions(bits=bits)).quantize(weight, Integer(bits, 16), None).dequantize()).all()


def test_a_scale_that_its_dtype_cannot_store_is_a_typed_error() -> None:
    with pytest.raises(NumericalError, match="float16"):
        grid_of(torch.full((1, 16), 1e6), Integer(4, 16, scale_dtype=torch.float16))


def gptq_in_float64(
    weight: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    order: np.ndarray,
    damping: float,
    bits: int,
    group_size: int,
    fit: Fit | None = None,
) -> np.ndarray:
    """GPTQ as the paper's equations (2) and (3) state it: remove one column at a time from the inverse Hessian.

    `fit` gives scale and zero point [out] of a group (its columns in `order`) when the first of them is reached.
    """
    scale, zero = scale.copy(), zero.copy()
    w, h = weight[:, order].copy(), hessian[np.ix_(order, order)].copy()
    h += damping * hessian.diagonal().mean() * np.eye(len(h))
    inverse = np.linalg.inv(h)
    out = np.empty_like(w)
    for i in range(len(h)):
        group = order[i] // group_size
        if fit is not None and i % group_size == 0:
            scale[:, group], zero[:, group] = fit(w[:, i : i + group_size], slice(i, i + group_size))
        s, z = scale[:, group], zero[:, group]
        out[:, i] = (np.clip(np.rint(w[:, i] / s + z), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - z) * s
        w -= np.outer((w[:, i] - out[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    restored = np.empty_like(out)
    restored[:, order] = out
    return restored


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (3, 32), (2, 64), (8, 64), (4, 96), (3, 192)])
def test_gptq_equals_the_papers_recursion(bits: int, group_size: int, symmetric: bool, act_order: bool) -> None:
    columns = 384  # more than one block of columns
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(1))
    x = inputs(columns, 1200, seed=2)
    hessian = x.T @ x
    form = Integer(bits, group_size, symmetric)
    codes = GPTQ(GPTQOptions(bits=bits, group_size=group_size, act_order=act_order)).quantize(weight, form, hessian)
    diagonal = hessian.diagonal()

    def fit(group: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray]:
        channel = Integer(bits, None, symmetric)
        scale, zero = grid_of(torch.from_numpy(group.astype(np.float32)), channel, "mse", diagonal[part])
        return scale[:, 0].double().numpy(), zero[:, 0].double().numpy()

    order = diagonal.argsort(descending=True).numpy() if act_order else np.arange(columns)
    zero = torch.zeros_like(codes.scale) if codes.zero is None else codes.zero
    expected = gptq_in_float64(
        weight.double().numpy(),
        hessian.double().numpy(),
        codes.scale.double().numpy(),
        zero.double().numpy(),
        order,
        0.01,
        bits,
        group_size,
        None if act_order else fit,
    )
    same = np.isclose(codes.dequantize().double().numpy(), expected, atol=1e-5)
    # float32 may tip a rounding; each tip moves its row's later columns. Nearly all rows must be untouched.
    assert same.all(axis=1).mean() >= 0.8
    assert same.mean() >= 0.95


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 48, 96, 192, 576])
def test_groups_in_order_are_fitted_to_repaired_weights_wherever_blocks_end(
    monkeypatch: pytest.MonkeyPatch, group_size: int, symmetric: bool
) -> None:
    weight = torch.randn(24, 576, generator=torch.Generator().manual_seed(1))
    x = inputs(576, 2000, seed=2)
    method, form = GPTQ(GPTQOptions(act_order=False)), Integer(4, group_size, symmetric)
    blocks = method.quantize(weight, form, x.T @ x)
    monkeypatch.setattr(gptq_module, "BLOCK", 576)
    whole = method.quantize(weight, form, x.T @ x)
    # The order of float32 sums differs, which may tip a rounding.
    assert (blocks.scale == whole.scale).float().mean() >= 0.95
    assert (blocks.codes == whole.codes).float().mean() >= 0.95


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_output_than_rtn(bits: int, symmetric: bool, act_order: bool) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    x = inputs(128, 1000, seed=4)
    form = Integer(bits, 32, symmetric)
    options = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    gptq = GPTQ(GPTQOptions(**options, act_order=act_order)).quantize(weight, form, x.T @ x)
    rtn = RTN(QuantizeOptions(**options)).quantize(weight, form, None)
    lost = [((x @ (c.dequantize() - weight).T) ** 2).sum() for c in (gptq, rtn)]
    assert lost[0] < (0.95 if bits == 2 else 0.7) * lost[1]  # two bits leave little to choose from


def test_factor_is_the_cholesky_factor_of_the_damped_inverse() -> None:
    x = inputs(48, 500, seed=5)
    h = x.T @ x
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    upper = inverse_factor(h, order, 0.01).double()
    damped = h.double()[order][:, order] + 0.01 * h.double().diagonal().mean() * torch.eye(48)
    expected = torch.linalg.inv(damped)
    assert torch.allclose(upper.T @ upper, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_damping_raises_itself_when_the_factorization_fails() -> None:
    x = torch.zeros(4, 64)
    x[0] = 1e3 * torch.randn(64, generator=torch.Generator().manual_seed(6))  # rank one: singular in float32
    hessian = x.T @ x
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(64)  # and now indefinite beyond the first damping
    assert torch.isfinite(inverse_factor(hessian, torch.arange(64), 0.01)).all()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_inputs_that_say_nothing_are_a_typed_error(bad: float) -> None:
    with pytest.raises(NumericalError):
        inverse_factor(torch.full((8, 8), bad), torch.arange(8), 0.01)


def test_unused_columns_do_not_disturb_the_others() -> None:
    x = inputs(64, 500, seed=7)
    x[:, 10:20] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(8))
    codes = GPTQ(GPTQOptions(bits=4, group_size=32)).quantize(weight, Integer(4, 32), x.T @ x)
    relative = ((x @ (codes.dequantize() - weight).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert relative < 0.01


def test_group_size_that_does_not_divide_names_the_nearest_that_does() -> None:
    with pytest.raises(ShapeMismatch) as caught:
        Integer(4, 128).groups(576)
    assert "128 does not divide 576" in caught.value.message
    assert "144" in (caught.value.hint or "")


def test_hessian_is_the_sum_of_outer_products() -> None:
    x = inputs(600, 90, seed=9)
    expected = x.double().T @ x.double()
    found = hessian(iter(x.view(3, 30, 600).split(1)))
    assert torch.equal(found, found.T)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
