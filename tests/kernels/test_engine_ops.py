"""The engine's operators against float64 formulas, on every instruction set that the machine has.

Bounds: a float32 sum of n products is off by at most about n * 2^-24 times the sum of their magnitudes. With 8-bit
activations the product must be that, with the *rounded* activations: 127 steps to the largest of a block of 32 columns,
or of two blocks for codes of up to 4 bits whose scales are as far apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_weights import Weight, random_weight

from gossamer.kernels import cpu

EPSILON = 2.0**-24
BLOCK = 32
SHAPES = [(64, 576, 64), (17, 96, 32), (48, 128, 128), (33, 1536, None), (3, 40, None), (16, 37, None), (1, 1, None)]
"""Rows, columns, group size (None: the row); rows that do not fill tiles, and columns that do not fill blocks."""
TOKENS = [1, 2, 3, 5, 6, 13, 100]


def inputs(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    """Activations with an outlier in some blocks, as models have them."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, ::70] *= 30
    return x


def rounded(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Activations [tokens, columns] as the 8-bit numbers that meet this weight stand for them, in float64."""
    width = -(-x.shape[1] // BLOCK) * BLOCK
    group = width if weight.scale.shape[1] == 1 else weight.group_size
    span = 2 * BLOCK if weight.bits <= 4 and group % (2 * BLOCK) == 0 else BLOCK
    blocks = torch.nn.functional.pad(x, (0, width - x.shape[1])).view(len(x), -1, span)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127.0 / largest.clamp(min=1e-30))).round()
    return (codes.double() * (largest * (1.0 / 127.0)).double()).view(len(x), width)[:, : x.shape[1]]


def pack(weights: list[Weight], interleave: bool = False) -> Any:
    ext = cpu.extension()
    parts = [ext.IntegerPart(*w.arguments, w.bits) for w in weights]
    return ext.pack_integer(ext.Arena(), parts, weights[0].codes.shape[1], interleave, 2)


def product(matrix: Any, x: torch.Tensor, exact: bool, threads: int = 1) -> torch.Tensor:
    y = np.full((len(x), matrix.rows), np.nan, np.float32)
    matrix.linear(x.numpy(), exact, threads, y)
    return torch.from_numpy(y).double()


def assert_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, magnitude: torch.Tensor) -> None:
    error = (y - x @ weight.T).abs()
    bound = (x.shape[1] + 8) * EPSILON * (x.abs() @ magnitude.T)
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.3g} of the bound"


def in_scale_dtype(weight: Weight, dtype: torch.dtype) -> Weight:
    return Weight(
        weight.codes, weight.packed, weight.scale.to(dtype).float(), weight.zero, weight.bits, weight.group_size
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_integer_products(isa: str, bits: int, asymmetric: bool) -> None:
    for n, (out, columns, group_size) in enumerate(SHAPES):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[n % 3]
        weight = in_scale_dtype(random_weight(out, columns, bits, group_size, asymmetric), dtype)
        matrix = pack([weight])
        for tokens in TOKENS:
            x = inputs(tokens, columns)
            assert_close(product(matrix, x, exact=True), x.double(), weight.exact(), weight.magnitude())
            assert_close(product(matrix, x, exact=False), rounded(x, weight), weight.exact(), 2 * weight.magnitude())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_products(isa: str, dtype: torch.dtype) -> None:
    ext = cpu.extension()
    for out, columns, _ in SHAPES:
        weight = inputs(out, columns, seed=2).to(dtype)
        if dtype is torch.bfloat16:
            matrix = ext.pack_bf16(ext.Arena(), [weight.view(torch.int16).numpy().view(np.uint16)], False, 2)
        else:
            matrix = ext.pack_f32(ext.Arena(), [weight.numpy()], False, 2)
        for tokens in TOKENS:
            x = inputs(tokens, columns)
            assert_close(product(matrix, x, exact=False), x.double(), weight.double(), weight.double().abs())


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    weight = random_weight(200, 128, 4, 32)
    matrix, x = pack([weight]), inputs(9, 128)
    assert torch.equal(product(matrix, x, False, threads=1), product(matrix, x, False, threads=3))


def test_parts_of_different_bits_and_groups_are_one_weight(isa: str) -> None:
    parts = [random_weight(20, 192, 4, 96), random_weight(7, 192, 3, 32, asymmetric=True), random_weight(5, 192, 6)]
    matrix, x = pack(parts), inputs(4, 192)
    assert matrix.rows == 32
    assert matrix.bits == 6
    weight, magnitude = (torch.cat([f(p) for p in parts]) for f in (Weight.exact, Weight.magnitude))
    assert_close(product(matrix, x, exact=True), x.double(), weight, magnitude + 256)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_rows_are_the_dequantized_weight_bit_for_bit(bits: int, asymmetric: bool) -> None:
    for out, columns, group_size in SHAPES:
        weight = random_weight(out, columns, bits, group_size, asymmetric)
        rows = np.arange(out, dtype=np.int32)[::-1].copy()
        found = np.empty((out, columns), np.float32)
        pack([weight]).take(rows, found)
        assert np.array_equal(found, weight.exact().flip(0).float().numpy())


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("columns", [1, 31, 64, 577])
def test_norms(isa: str, kind: str, columns: int) -> None:
    x, weight, bias = inputs(5, columns) + 3, inputs(1, columns, 2)[0], inputs(1, columns, 3)[0]
    y = np.empty((5, columns), np.float32)
    for b in (None, bias):
        cpu.extension().norm(kind, x.numpy(), weight.numpy(), None if b is None else b.numpy(), 1e-5, y)
        wide = x.double()
        centred = wide if kind == "rms" else wide - wide.mean(-1, keepdim=True)
        expected = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        expected = expected if b is None else expected + b.double()
        torch.testing.assert_close(torch.from_numpy(y).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gates(isa: str, activation: str) -> None:
    """Within 1e-6 of the float64 formula, relative to the larger of 1 and its size; far from zero too."""
    gate = torch.cat((torch.linspace(-30, 30, 992), torch.tensor([0.0, -0.0, 1e4, -1e4, 88.8, -88.8, 1e-30, -1e-30])))
    gate = torch.nn.functional.pad(gate, (0, -len(gate) % 32))
    up = torch.randn(len(gate), generator=torch.Generator().manual_seed(0))
    y = np.empty(len(gate), np.float32)
    cpu.extension().gate(activation, gate.numpy(), up.numpy(), y)
    f = torch.nn.functional
    wide = gate.double()
    formula = {"silu": f.silu, "gelu": f.gelu, "gelu_pytorch_tanh": lambda v: f.gelu(v, approximate="tanh")}
    expected = formula[activation](wide) * up.double()
    error = (torch.from_numpy(y).double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) < 1e-6


def test_activations_of_zero_and_of_no_number_do_no_harm(isa: str) -> None:
    matrix = pack([random_weight(32, 64, 4, 32)])
    assert not product(matrix, torch.zeros(3, 64), exact=False).any()
    x = torch.zeros(3, 64)
    x[1, 5] = torch.nan
    y = product(matrix, x, exact=False)
    assert not y[0].any()
    assert not y[2].any()
    assert bool(y[1].isnan().all()), "what is no number must not become one"


class TestRefusals:
    """No argument that Python can pass reads or writes outside its arrays."""

    def test_products(self) -> None:
        matrix = pack([random_weight(32, 64, 4, 32)])
        x, y = np.zeros((2, 64), np.float32), np.zeros((2, 32), np.float32)
        for bad_x, bad_y, threads in [
            (x[:, :63].copy(), y, 1), (x, y[:1].copy(), 1), (x, y[:, :31].copy(), 1), (x, y, 0), (x, y, 5000),
            (x[:, ::2], y, 1), (x.astype(np.float64), y, 1), (x[0], y, 1),
        ]:  # fmt: skip
            with pytest.raises((ValueError, TypeError)):
                matrix.linear(bad_x, False, threads, bad_y)
        with pytest.raises(ValueError, match="no such row"):
            matrix.take(np.array([32], np.int32), np.zeros((1, 64), np.float32))

    def test_packing(self) -> None:
        ext = cpu.extension()
        good = random_weight(32, 64, 4, 32)
        packed, scale, _ = good.arguments
        for parts, columns, interleave in [
            ([], 64, False),
            ([ext.IntegerPart(packed, scale, None, 4)], 0, False),
            ([ext.IntegerPart(packed, scale, None, 4)], 96, False),
            ([ext.IntegerPart(packed, scale, None, 9)], 64, False),
            ([ext.IntegerPart(packed, scale[:31].copy(), None, 4)], 64, False),
            ([ext.IntegerPart(packed, scale, np.zeros((32, 1), np.int8), 4)], 64, False),
            ([ext.IntegerPart(packed, scale, None, 4)], 64, True),
            ([ext.IntegerPart(packed, np.ones((32, 4), np.float32), None, 4)], 64, False),  # groups of 16
        ]:
            with pytest.raises(ValueError, match=r"\w"):
                ext.pack_integer(ext.Arena(), parts, columns, interleave, 1)
