"""LLM.int8(): which columns are kept, what becomes of the others, and what it gains."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize.llm_int8 import LLMInt8, LLMInt8Options, kept, outlier_columns
from gossamer.compress.quantize.rtn import RTN
from gossamer.errors import NumericalError, ShapeMismatch
from gossamer.formats import Integer
from random_blocks import make_block, make_view

FORM = Integer(8, None, outliers=True)


def test_columns_are_those_that_reach_the_threshold_the_largest_first() -> None:
    activations = torch.tensor([1.0, 7.0, 5.9, 6.0, 30.0, 0.0, 8.0, 2.0])
    assert outlier_columns(activations, 6.0, 1.0).tolist() == [1, 3, 4, 6]
    assert outlier_columns(activations, 6.0, 0.25).tolist() == [4, 6]
    assert outlier_columns(activations, 6.0, 0.0).tolist() == []
    assert outlier_columns(activations, 31.0, 1.0).tolist() == []


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_kept_columns_are_exact_to_bfloat16_and_the_rest_is_rounded_as_if_they_were_zero(
    bits: int, symmetric: bool
) -> None:
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(0))
    weight[:, [5, 30]] *= 40  # which would stretch the grid of every row
    form = Integer(bits, None, symmetric, outliers=True)
    codes = kept(weight, torch.tensor([5, 30]), form, "none")
    value = codes.dequantize()
    assert torch.equal(value[:, [5, 30]], weight[:, [5, 30]].bfloat16().float())
    rest = weight.clone()
    rest[:, [5, 30]] = 0
    alone = RTN(QuantizeOptions(bits=bits)).quantize(rest, Integer(bits, None, symmetric), None).dequantize()
    rest_columns = [c for c in range(48) if c not in (5, 30)]
    assert torch.equal(value[:, rest_columns], alone[:, rest_columns])
    assert torch.equal(form.unpack(form.pack(codes)), value)  # as a reader will see it
    parts = codes.split([4, 6])
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), value)


def test_a_block_keeps_what_its_own_inputs_ask_for() -> None:
    block = make_block()
    originals = {role: getattr(block, role).weight.clone() for role in ("q", "o", "gate", "down")}
    view = make_view(block, FORM)
    view.x[0, 3, 11] = 500.0
    threshold = 9.0
    LLMInt8(LLMInt8Options(threshold=threshold, outlier_share=0.5)).compress(view)
    inputs = block.attn_norm(view.x).abs().flatten(0, 1).amax(0)
    columns = (inputs >= threshold).nonzero().flatten()
    assert 0 < len(columns) < 32
    outliers = view.decided["q"].outliers
    assert outliers is not None
    assert outliers.columns.unique().tolist() == columns.tolist()
    assert torch.equal(view.decided["q"].dequantize()[:, columns], originals["q"][:, columns].bfloat16().float())
    for role, weight in originals.items():
        assert (view.decided[role].dequantize() - weight).abs().max() < 0.01


def test_outliers_lose_less_of_the_output_than_a_grid_that_must_reach_them() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(200, 64, generator=generator), torch.randn(32, 64, generator=generator) * 0.05
    x[:, 7] *= 50
    plain = RTN(QuantizeOptions(bits=4)).quantize(weight, Integer(4, None), None)
    codes = kept(weight, outlier_columns(x.abs().amax(0), 6.0, 0.05), Integer(4, None, outliers=True), "none")
    lost = [((x @ (c.dequantize() - weight).T) ** 2).sum() for c in (plain, codes)]
    assert lost[1] < 0.1 * lost[0]


def test_without_outliers_it_is_rounding() -> None:
    block = make_block()
    expected = RTN(QuantizeOptions(bits=8)).quantize(block.up.weight, Integer(8, None), None)
    view = make_view(block, FORM)
    LLMInt8(LLMInt8Options(threshold=1e9)).compress(view)
    assert torch.equal(view.decided["up"].dequantize(), expected.dequantize())
    assert len(view.decided["up"].outliers or ()) == 0


def test_its_format_has_room_for_the_columns_that_may_be_kept() -> None:
    options = LLMInt8Options(outlier_share=0.125)
    form = options.layer_format(options, [64])
    assert form == Integer(8, None, outliers=True, outlier_share=0.125)
    assert form.nbytes((10, 64)) - Integer(8, None).nbytes((10, 64)) == 10 * 8 * 4 + 11 * 4


def test_what_it_refuses() -> None:
    with pytest.raises(ShapeMismatch, match="does not divide"):
        LLMInt8(LLMInt8Options()).compress(make_view(make_block(), Integer(8, 40, outliers=True)))
    view = make_view(make_block(), FORM)
    view.x[1, 2, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"q_proj.*64 of 64 input channels"):
        LLMInt8(LLMInt8Options()).compress(view)
    for bad in ({"threshold": 0.0}, {"outlier_share": 2.0}, {"format": "nf4"}, {"treshold": 6.0}):
        with pytest.raises(ValidationError):
            LLMInt8Options.model_validate(bad)
    with pytest.raises(ValidationError, match="not beside fp8"):
        LLMInt8Options.model_validate({"layers": {"down": {"format": "fp8"}}})
