"""Linear kernels against the float64 formula, on every instruction set that the machine has.

Bound: a sum of n float32 products, in any order, is off by at most about n * 2^-24 times the sum of their magnitudes.
The kernels work on stored codes, so the magnitudes count the offset and the zero point.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_weights import Weight, random_weight

from gossamer.kernels import cpu, reference

EPSILON = 2.0**-24
SHAPES = [
    (64, 576, 64),
    (17, 96, 32),
    (9, 128, 128),
    (5, 1536, None),
    (3, 40, 8),
    (2, 37, None),
    (4, 30, 6),
    (1, 1, None),
    (7, 8, 4),
]
"""Rows, columns, group size (None: the row): groups that fill vectors, and groups that do not."""


def inputs(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def assert_close(y: np.ndarray, x: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """y is x times exact^T within the bound that the module states."""
    error = (torch.from_numpy(y).double() - x.double() @ exact.T).abs()
    bound = (x.shape[1] + 8) * EPSILON * (x.double().abs() @ magnitude.T)
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.3g} of the bound"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_packed_linear_is_the_product_with_the_dequantized_weight(isa: str, bits: int, asymmetric: bool) -> None:
    for out, columns, group_size in SHAPES:
        weight = random_weight(out, columns, bits, group_size, asymmetric)
        for tokens in (1, 2, 3, 4, 7):
            x = inputs(tokens, columns)
            y = cpu.packed_linear(x.numpy(), *weight.arguments, bits, weight.group_size, 1)
            assert_close(y, x, weight.exact(), weight.magnitude())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantize_equals_the_reference_bit_for_bit(isa: str, bits: int, asymmetric: bool) -> None:
    for out, columns, group_size in SHAPES:
        weight = random_weight(out, columns, bits, group_size, asymmetric)
        expected = reference.dequantize(weight.packed, weight.scale, weight.zero, bits, weight.group_size)
        assert np.array_equal(cpu.dequantize(*weight.arguments, bits, weight.group_size, 1), expected.numpy())


@pytest.mark.parametrize(("out", "columns"), [(64, 576), (17, 96), (5, 33), (3, 1), (1, 64)])
def test_dense_linear_bf16_is_the_product_with_the_weight(isa: str, out: int, columns: int) -> None:
    weight = inputs(out, columns, seed=2).bfloat16()
    for tokens in (1, 2, 3, 4, 7):
        x = inputs(tokens, columns)
        y = cpu.dense_linear_bf16(x.numpy(), weight.view(torch.int16).numpy().view(np.uint16), 1)
        assert_close(y, x, weight.double(), weight.double().abs())


@given(
    bits=st.integers(2, 8),
    out=st.integers(1, 40),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 96),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_linear_holds_its_bound_for_any_shape(
    isa: str, bits: int, out: int, groups: int, group_size: int, tokens: int, seed: int
) -> None:
    weight = random_weight(out, groups * group_size, bits, group_size, seed % 2 == 1, seed)
    x = inputs(tokens, groups * group_size, seed)
    y = cpu.packed_linear(x.numpy(), *weight.arguments, bits, group_size, 2)
    assert_close(y, x, weight.exact(), weight.magnitude())


def test_nan_in_one_row_of_a_dense_weight_stays_in_that_row(isa: str) -> None:
    weight = torch.ones(3, 33).bfloat16()  # 33 columns: the row's last vector is not full
    weight[1] = torch.nan
    y = cpu.dense_linear_bf16(np.ones((1, 33), np.float32), weight.view(torch.int16).numpy().view(np.uint16), 1)
    assert y[0, 0] == y[0, 2] == 33
    assert np.isnan(y[0, 1])


def large() -> tuple[Weight, np.ndarray]:
    """A product with enough work that several threads share it."""
    return random_weight(1000, 512, 4, 64, asymmetric=True), inputs(2, 512).numpy()


def test_result_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    weight, x = large()
    alone = cpu.packed_linear(x, *weight.arguments, 4, 64, 1)
    for threads in (2, 3, 8):
        assert np.array_equal(cpu.packed_linear(x, *weight.arguments, 4, 64, threads), alone)


def test_zero_tokens_give_an_empty_result(isa: str) -> None:
    weight = random_weight(8, 64, 4, 32)
    assert cpu.packed_linear(np.zeros((0, 64), np.float32), *weight.arguments, 4, 32, 1).shape == (0, 8)
    assert cpu.dense_linear_bf16(np.zeros((0, 64), np.float32), np.zeros((8, 64), np.uint16), 1).shape == (0, 8)


def test_weight_without_rows_gives_an_empty_result(isa: str) -> None:
    weight = random_weight(8, 64, 4, 32)
    packed, scale, _ = (a[:0] if a is not None else None for a in weight.arguments)
    assert cpu.packed_linear(np.zeros((2, 64), np.float32), packed, scale, None, 4, 32, 1).shape == (2, 0)
    assert cpu.dequantize(packed, scale, None, 4, 32, 1).shape == (0, 64)
