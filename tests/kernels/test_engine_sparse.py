"""Products with weights that are held without their zeros: float64 formulas, and the very bits of the whole weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from random_weights import Weight, random_weight
from test_engine_ops import SHAPES, TOKENS, assert_close, inputs, pack, product, rounded

from gossamer.kernels import cpu, reference

SPARSITIES = (0.5, 0.0, 0.97, 0.25, 1.0, 0.5, 0.5)
"""Of the shapes in their order."""


def gone(out: int, columns: int, sparsity: float) -> torch.Tensor:
    return torch.rand(out, columns, generator=torch.Generator().manual_seed(out + columns)) < sparsity


def pruned(out: int, columns: int, bits: int, group_size: int | None, sparsity: float, **changes: Any) -> Weight:
    weight = random_weight(out, columns, bits, group_size, **changes)
    codes = weight.codes.masked_fill(gone(out, columns, sparsity), 0)
    return replace(weight, codes=codes, packed=reference.pack_codes(codes, bits))


def pack_bf16(weights: list[torch.Tensor], interleave: bool = False) -> Any:
    ext = cpu.extension()
    arrays = [w.view(torch.int16).numpy().view(np.uint16) for w in weights]
    return ext.pack_bf16(ext.Arena(), arrays, interleave, 2)


def squeeze(whole: Any) -> Any:
    return cpu.extension().squeeze(cpu.extension().Arena(), whole, 2)


@pytest.mark.parametrize("bits", [7, 8])
def test_integer_products(isa: str, bits: int) -> None:
    for (out, columns, group_size), sparsity in zip(SHAPES, SPARSITIES, strict=True):
        weight = pruned(out, columns, bits, group_size, sparsity)
        whole = pack([weight])
        matrix = squeeze(whole)
        for tokens in TOKENS:
            x = inputs(tokens, columns)
            for exact, seen in ((True, x.double()), (False, rounded(x, weight))):
                found = product(matrix, x, exact)
                assert_close(found, seen, weight.exact(), 2 * weight.magnitude())
                assert torch.equal(found, product(whole, x, exact))


def test_bfloat16_products(isa: str) -> None:
    for (out, columns, _), sparsity in zip(SHAPES, SPARSITIES, strict=True):
        weight = inputs(out, columns, seed=2).masked_fill(gone(out, columns, sparsity), 0.0).bfloat16()
        whole = pack_bf16([weight])
        matrix = squeeze(whole)
        for tokens in TOKENS:
            x = inputs(tokens, columns)
            found = product(matrix, x, exact=False)
            assert_close(found, x.double(), weight.double(), weight.double().abs())
            assert torch.equal(found, product(whole, x, exact=False))


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    matrix, x = squeeze(pack([pruned(200, 128, 8, 32, 0.5)])), inputs(9, 128)
    assert torch.equal(product(matrix, x, False, threads=1), product(matrix, x, False, threads=3))


def test_what_is_held_is_a_bit_for_each_number_and_the_nonzeros() -> None:
    weight = pruned(64, 256, 8, None, 0.5)
    whole = pack([weight])
    zeros = int((weight.codes == 0).sum())
    scales = whole.nbytes - 64 * 256
    assert squeeze(whole).nbytes <= 64 * 256 * 9 // 8 - zeros + scales * 9 // 8
    floats = torch.randn(64, 256).masked_fill(gone(64, 256, 0.5), 0.0).bfloat16()
    nonzeros = int((floats != 0).sum())
    assert squeeze(pack_bf16([floats])).nbytes == 64 * 256 // 8 + 2 * nonzeros


def test_what_cannot_be_squeezed_is_refused() -> None:
    ext, arena = cpu.extension(), cpu.extension().Arena()
    kept = pack([pruned(16, 64, 8, None, 0.5)])
    kept.keep(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32))
    once = squeeze(pack([pruned(16, 64, 8, None, 0.5)]))
    floats = ext.pack_f32(ext.Arena(), [np.zeros((16, 64), np.float32)], False, 1)
    asymmetric = pack([random_weight(16, 64, 8, 32, asymmetric=True)])
    for bad in (kept, once, floats, asymmetric, pack([random_weight(16, 64, 4, 32)])):
        with pytest.raises(ValueError, match="can be squeezed"):
            ext.squeeze(arena, bad, 1)
    with pytest.raises(ValueError, match="threads"):
        ext.squeeze(arena, pack([random_weight(16, 64, 8)]), 0)
    with pytest.raises(ValueError, match="squeezed"):
        once.take(np.zeros(1, np.int32), np.empty((1, 64), np.float32))
    with pytest.raises(ValueError, match="squeezed"):
        once.keep(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32))
