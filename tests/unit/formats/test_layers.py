"""Layers that multiply by stored weights, on both ways to compute, against float64 products of dequantized weights."""

from __future__ import annotations

import pytest
import torch

from format_codes import FORMATS, random_codes
from gossamer.errors import KernelError
from gossamer.formats import Format
from gossamer.formats.linear import PackedEmbedding, stored_linear
from gossamer.kernels import dispatch

ids = [form.name for form in FORMATS]


@pytest.fixture(params=["cpu", "reference"])
def kernels(request, monkeypatch) -> str:
    monkeypatch.setenv("GOSSAMER_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_layer_multiplies_by_what_its_weight_stands_for(kernels: str, form: Format, tokens: int) -> None:
    q = random_codes(form, 24, 128, 2)
    g = torch.Generator().manual_seed(1)
    bias, x = torch.randn(24, generator=g), torch.randn(tokens, 128, generator=g)
    layer = stored_linear(form, form.pack(q), bias)
    weight = q.dequantize().double()
    expected = x.double() @ weight.T + bias
    found = layer(x.view(1, tokens, 128))
    assert found.shape == (1, tokens, 24)
    size = (x.double().abs() @ weight.abs().T) + bias.abs()  # sums in float32 are off by some 2^-24 of this
    assert ((found[0].double() - expected).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_rows_are_looked_up_with_their_outliers(kernels: str, form: Format) -> None:
    q = random_codes(form, 24, 128, 2)
    embedding = PackedEmbedding(stored_linear(form, form.pack(q)))
    tokens = torch.tensor([[3, 0, 23], [3, 3, 17]])
    assert torch.equal(embedding(tokens), q.dequantize()[tokens])
    assert embedding(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 128)


def test_tensors_that_make_no_table_are_refused_with_what_arrived(kernels: str) -> None:
    packed, levels, scale = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(16), torch.ones(4, 2)
    assert dispatch.look_up(packed, levels, scale, 4, 16).shape == (4, 16)
    for bad in (
        (packed[:, :1], levels, scale, 4, 16),
        (packed.long(), levels, scale, 4, 16),
        (packed, levels[:15], scale, 4, 16),
        (packed, levels.expand(3, 16), scale, 4, 16),
        (packed, levels, scale[:3], 4, 16),
        (packed, levels, torch.ones(4, 3), 4, 16),
        (packed, levels.double(), scale, 4, 16),
        (packed, levels, scale, 0, 16),
    ):
        with pytest.raises(KernelError, match="levels"):
            dispatch.look_up(*bad)
    with pytest.raises(KernelError, match="any, any"):
        dispatch.linear_table(torch.zeros(16), packed, levels, scale, 4)


def test_sparse_rows_are_multiplied_a_few_tokens_at_a_time(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    dense = torch.randn(6, 20, generator=g) * (torch.rand(6, 20, generator=g) < 0.2)
    rows, columns = dense.nonzero(as_tuple=True)
    pointers = torch.zeros(7, dtype=torch.int32)
    pointers[1:] = torch.bincount(rows, minlength=6).cumsum(0)
    x = torch.randn(9, 20, generator=g)
    monkeypatch.setattr(dispatch, "SPARSE_AT_ONCE", 4 * len(rows))
    found = dispatch.linear_sparse(x, pointers, columns.short(), dense[rows, columns])
    assert torch.allclose(found, x @ dense.T, atol=1e-5)
    with pytest.raises(KernelError, match="sparse"):
        dispatch.linear_sparse(x, pointers, columns.short()[1:], dense[rows, columns])
