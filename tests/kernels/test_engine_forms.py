"""Products with weights that are no integers against float64 formulas, on every instruction set that the machine has.

A code of 4 bits is the number of one of 16 levels. With exact activations the product is that of levels[code] * scale,
to the rounding of float32. With 8-bit activations a level is the nearest whole number of steps: exactly it where the
largest is up to 15 steps and all are whole numbers of them (E2M1), and else no further than LEVEL_ERROR of the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_ops import BLOCK, EPSILON, TOKENS, assert_close, inputs, product

from gossamer.formats.codebook import E2M1_LEVELS, FP4_TWELFTHS, NF4_LEVELS
from gossamer.kernels import cpu, reference

E2M1 = [*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)]
FP4 = [*(n / 12 for n in FP4_TWELFTHS), *(-n / 12 for n in FP4_TWELFTHS)]
LEVELS = {"nf4": list(NF4_LEVELS), "fp4": FP4, "e2m1": E2M1}
LEVEL_ERROR = {"nf4": 0.0039, "fp4": 0.0053, "e2m1": 0.0}
"""Of the largest level: 112 steps to it, 12, and 12."""
SHAPES = [(64, 576, 64), (17, 96, 32), (48, 128, 16), (33, 48, 16), (3, 40, None), (16, 37, None), (33, 1536, None)]
"""Rows, columns, group size (None: the row); 48 columns by groups of 16 end in half a block."""


@dataclass(frozen=True)
class Coded:
    """A random weight of 16 levels."""

    codes: torch.Tensor
    levels: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor | None

    def exact(self, levels: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [out, in] in float64."""
        levels = (self.levels if levels is None else levels).double()
        grouped = levels[self.codes.long()].view(*self.scale.shape, -1) * self.scale.double().unsqueeze(-1)
        weight = grouped.view(self.codes.shape)
        return weight if self.factor is None else weight * self.factor.double().unsqueeze(1)

    def part(self) -> Any:
        packed = reference.pack_codes((self.codes - 8).to(torch.int8), 4).numpy()
        return cpu.extension().IntegerPart(packed, self.scale.numpy(), None, 4)


def random_scale(shape: tuple[int, int], kind: str, generator: torch.Generator) -> torch.Tensor:
    """Positive scales that are numbers of this kind."""
    scale = torch.rand(shape, generator=generator) * 2 + 0.02
    if kind == "e8m0":
        return 2.0 ** scale.log2().round()
    if kind == "e4m3":
        return scale.to(torch.float8_e4m3fn).float()
    return scale.to({"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[kind]).float()


def random_coded(
    kind: str, out: int, columns: int, group_size: int | None, scale: str = "bf16", factor: bool = False, seed: int = 0
) -> Coded:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, columns), generator=generator).to(torch.int8)
    groups = 1 if group_size is None else columns // group_size
    own = torch.rand(out, generator=generator) + 0.5 if factor else None
    return Coded(codes, torch.tensor(LEVELS[kind]), random_scale((out, groups), scale, generator), own)


def pack(weights: list[Coded], interleave: bool = False) -> Any:
    ext = cpu.extension()
    factors = [None if w.factor is None else w.factor.numpy() for w in weights]
    levels, columns = weights[0].levels.numpy(), weights[0].codes.shape[1]
    return ext.pack_codebook(ext.Arena(), [w.part() for w in weights], factors, levels, columns, interleave, 2)


def rounded(x: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """Activations as the 8-bit numbers that meet the weight stand for them: 127 steps to the largest of 32 or 64."""
    width = -(-x.shape[1] // BLOCK) * BLOCK
    span = 2 * BLOCK if (width if group_size is None else group_size) % (2 * BLOCK) == 0 else BLOCK
    blocks = torch.nn.functional.pad(x, (0, width - x.shape[1])).view(len(x), -1, span)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127.0 / largest.clamp(min=1e-30))).round()
    return (codes.double() * (largest * (1.0 / 127.0)).double()).view(len(x), width)[:, : x.shape[1]]


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("factor", [False, True])
def test_products_with_levels(isa: str, kind: str, factor: bool) -> None:
    for n, (out, columns, group_size) in enumerate(SHAPES):
        scale = ("bf16", "e8m0", "e4m3", "f16", "f32")[n % 5]
        weight = random_coded(kind, out, columns, group_size, scale, factor, seed=n)
        matrix, exact = pack([weight]), weight.exact()
        # What an executor that works on whole steps adds up, before it takes away what it added to levels.
        magnitude = exact.abs() + 2 * weight.exact(torch.full((16,), float(weight.levels.abs().max())))
        for tokens in TOKENS:
            x = inputs(tokens, columns)
            assert_close(product(matrix, x, exact=True), x.double(), exact, magnitude)
            eight = rounded(x, group_size)
            slack = LEVEL_ERROR[kind] * eight.abs() @ weight.exact(weight.levels.abs().max().expand(16)).abs().T
            error = (product(matrix, x, exact=False) - eight @ exact.T).abs()
            bound = (columns + 8) * EPSILON * (eight.abs() @ magnitude.T) + slack
            assert bool((error <= bound).all()), f"{columns} columns: {float((error / bound).max()):.3g} of the bound"


def test_levels_of_nf4_are_rounded_where_activations_are(isa: str) -> None:
    """So the bound above is one, and not an excuse: products differ, and by less than it."""
    weight = random_coded("nf4", 64, 576, 64)
    x = inputs(4, 576)
    moved = (product(pack([weight]), x, exact=False) - rounded(x, 64) @ weight.exact().T).abs().max()
    assert float(moved) > 1e-3


@pytest.mark.parametrize("scale", ["e8m0", "e4m3", "bf16", "f16", "f32"])
@pytest.mark.parametrize("group_size", [16, 32, 64, None])
def test_rows_are_the_dequantized_weight(scale: str, group_size: int | None) -> None:
    for kind in LEVELS:
        weight = random_coded(kind, 37, 192, group_size, scale)
        found = np.empty((37, 192), np.float32)
        pack([weight]).take(np.arange(37, dtype=np.int32), found)
        torch.testing.assert_close(torch.from_numpy(found).double(), weight.exact(), rtol=3e-7, atol=0)


def test_scales_of_a_byte_are_held_in_a_byte() -> None:
    """A group of 32 has 16 rows of 32 codes of 4 bits, and 16 scales."""
    sizes = {scale: pack([random_coded("e2m1", 16, 512, 32, scale)]).nbytes for scale in ("e8m0", "e4m3", "bf16")}
    factors = 16 * 4
    assert sizes["e8m0"] == sizes["e4m3"] == 16 * (256 + 16) + factors
    assert sizes["bf16"] == 16 * (256 + 32) + factors


@pytest.mark.parametrize("group_size", [16, 64])
def test_parts_in_turns_have_the_rows_of_both(isa: str, group_size: int) -> None:
    """As gate and up: each tile of one beside that of the other; the product is seen through a model elsewhere."""
    parts = [random_coded("nf4", 40, 128, group_size, seed=s, factor=True) for s in (1, 2)]
    assert pack(parts, interleave=True).nbytes == 2 * pack(parts[:1]).nbytes
    matrix = pack(parts)
    x = inputs(3, 128)
    weight = torch.cat([p.exact() for p in parts])
    assert_close(product(matrix, x, exact=True), x.double(), weight, weight.abs())


def every_e4m3() -> torch.Tensor:
    """All 8-bit floats that are numbers, as bytes."""
    return torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)


@pytest.mark.parametrize("tokens", TOKENS)
def test_products_with_8_bit_floats(isa: str, tokens: int) -> None:
    ext = cpu.extension()
    generator = torch.Generator().manual_seed(0)
    for out, columns in [(64, 576), (17, 96), (3, 37), (33, 254)]:
        bits = every_e4m3()[torch.randint(0, 254, (out, columns), generator=generator)]
        factor = torch.rand(out, generator=generator) + 0.1
        matrix = ext.pack_e4m3(ext.Arena(), [bits.numpy()], [factor.numpy()], False, 2)
        weight = bits.view(torch.float8_e4m3fn).double() * factor.double().unsqueeze(1)
        x = inputs(tokens, columns)
        for exact in (True, False):
            assert_close(product(matrix, x, exact=exact), x.double(), weight, weight.abs())


def test_every_8_bit_float_is_itself(isa: str) -> None:
    ext, bits = cpu.extension(), every_e4m3()
    matrix = ext.pack_e4m3(ext.Arena(), [bits[:, None].numpy()], [None], False, 1)
    expected = bits.view(torch.float8_e4m3fn).float()
    assert torch.equal(product(matrix, torch.ones(1, 1), exact=True)[0].float(), expected)
    found = np.empty((254, 1), np.float32)
    matrix.take(np.arange(254, dtype=np.int32), found)
    assert torch.equal(torch.from_numpy(found)[:, 0], expected)


@pytest.mark.parametrize("exact", [False, True])
def test_weights_kept_beside_are_added_to_the_product(isa: str, exact: bool) -> None:
    """Single ones, whole columns, and rows without any; with 8-bit activations they meet those of float32."""
    generator = torch.Generator().manual_seed(0)
    for out, columns in [(64, 576), (17, 96), (3, 37)]:
        weight = random_coded("e2m1", out, columns, None)
        beside = torch.zeros(out, columns)
        places = torch.rand(out, columns, generator=generator) < 0.02
        places[:, 5] = True
        places[1:2] = False
        beside[places] = torch.randn(int(places.sum()), generator=generator) * 20
        rows, cols = places.nonzero(as_tuple=True)
        matrix = pack([weight])
        before = matrix.nbytes
        order = torch.randperm(len(rows), generator=generator)
        matrix.keep(rows[order].int().numpy(), cols[order].int().numpy(), beside[rows, cols][order].numpy())
        assert matrix.nbytes > before
        magnitude = beside.double().abs() + 3 * weight.exact(torch.full((16,), 6.0))
        for tokens in TOKENS:
            x = inputs(tokens, columns)
            dense = x.double() if exact else rounded(x, None)
            expected = dense @ weight.exact().T + x.double() @ beside.double().T
            bound = (columns + 8) * EPSILON * (x.double().abs() + dense.abs()) @ magnitude.T
            assert bool(((product(matrix, x, exact) - expected).abs() <= bound).all())
        found = np.empty((out, columns), np.float32)
        matrix.take(np.arange(out, dtype=np.int32), found)
        torch.testing.assert_close(
            torch.from_numpy(found).double(), weight.exact() + beside.double(), rtol=1e-6, atol=0
        )


class TestRefusals:
    """No argument that Python can pass reads or writes outside its arrays."""

    def test_codebooks(self) -> None:
        ext = cpu.extension()
        weight = random_coded("nf4", 32, 64, 32)
        levels, part = weight.levels.numpy(), weight.part()
        bad_levels = levels.copy()
        bad_levels[3] = np.nan
        three = ext.IntegerPart(reference.pack_codes(torch.zeros(32, 64, dtype=torch.int8), 3).numpy(),
                                weight.scale.numpy(), None, 3)  # fmt: skip
        zeros = ext.IntegerPart(
            reference.pack_codes((weight.codes - 8).to(torch.int8), 4).numpy(), weight.scale.numpy(),
            np.zeros((32, 2), np.int8), 4,
        )  # fmt: skip
        eight = random_coded("nf4", 32, 64, 8).part()
        for parts, factors, table in [
            ([], [], levels), ([part], [], levels), ([part], [np.ones(31, np.float32)], levels),
            ([part], [None], levels[:15].copy()), ([part], [None], bad_levels), ([three], [None], levels),
            ([zeros], [None], levels), ([eight], [None], levels),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=r"\w"):
                ext.pack_codebook(ext.Arena(), parts, factors, table, 64, False, 1)

    def test_8_bit_floats(self) -> None:
        ext = cpu.extension()
        nan = np.full((4, 8), 0xFF, np.uint8)
        for arrays, factors in [([], []), ([nan], [None]), ([nan * 0], [np.ones(3, np.float32)])]:
            with pytest.raises(ValueError, match=r"\w"):
                ext.pack_e4m3(ext.Arena(), arrays, factors, False, 1)

    def test_weights_kept_beside(self) -> None:
        matrix = pack([random_coded("nf4", 20, 64, 32)])
        one, value = np.array([1], np.int32), np.ones(1, np.float32)
        for rows, columns, values in [
            (one * 20, one, value), (one, one * 64, value), (-one, one, value), (one, -one, value),
            (one, one, np.ones(2, np.float32)), (one, np.array([1, 2], np.int32), value),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=r"\w"):
                matrix.keep(rows, columns, values)
        matrix.keep(one, one, value)
        with pytest.raises(ValueError, match="already"):
            matrix.keep(one, one, value)
