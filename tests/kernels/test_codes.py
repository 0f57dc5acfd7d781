"""Bit packing: the C++ code, the torch oracle and compressed-tensors agree on every bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import KernelError
from gossamer.kernels import cpu, reference

shapes = st.tuples(st.integers(1, 8), st.integers(1, 5), st.integers(1, 131), st.integers(0, 2**32 - 1))


def random_codes(bits: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).to(torch.int8)


@given(shapes)
def test_pack_codes_writes_what_compressed_tensors_writes(shape: tuple[int, int, int, int]) -> None:
    bits = shape[0]
    codes = random_codes(*shape)
    theirs = pack_to_int32(codes, bits)
    assert np.array_equal(cpu.pack_codes(codes.numpy(), bits), theirs.numpy())
    assert torch.equal(reference.pack_codes(codes, bits), theirs)


@given(shapes)
def test_unpack_codes_reads_what_compressed_tensors_wrote(shape: tuple[int, int, int, int]) -> None:
    bits, _, columns, _ = shape
    codes = random_codes(*shape)
    packed = pack_to_int32(codes, bits)
    assert np.array_equal(cpu.unpack_codes(packed.numpy(), bits, columns), codes.numpy())
    assert torch.equal(reference.unpack_codes(packed, bits, columns), codes)


@given(shapes)
def test_unpack_codes_reads_any_words_as_compressed_tensors_does(shape: tuple[int, int, int, int]) -> None:
    bits, rows, columns, seed = shape
    packed = torch.from_numpy(np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, 131), np.int32))
    packed = packed[:, : cpu.words(columns, bits)].contiguous()
    theirs = unpack_from_int32(packed, bits, torch.Size((rows, columns)))
    assert np.array_equal(cpu.unpack_codes(packed.numpy(), bits, columns), theirs.numpy())
    assert torch.equal(reference.unpack_codes(packed, bits, columns), theirs)


def test_packed_words_are_as_many_as_the_bits_need() -> None:
    assert cpu.pack_codes(np.zeros((3, 33), np.int8), 3).shape == (3, 4)
    assert cpu.words(32, 3) == 3


def test_empty_codes_pack_to_empty_words() -> None:
    assert cpu.pack_codes(np.zeros((0, 64), np.int8), 4).shape == (0, 8)
    assert cpu.pack_codes(np.zeros((3, 0), np.int8), 4).shape == (3, 0)
    assert cpu.unpack_codes(np.zeros((3, 0), np.int32), 4, 0).shape == (3, 0)


@pytest.mark.parametrize("value", [-9, 8])
def test_code_that_does_not_fit_is_refused_with_its_range(value: int) -> None:
    codes = np.zeros((1, 8), np.int8)
    codes[0, 3] = value
    with pytest.raises(KernelError, match=rf"codes from .*{value}.* do not fit in 4 bits"):
        cpu.pack_codes(codes, 4)
