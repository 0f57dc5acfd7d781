"""SignRound: its formula, its bounds, better than its start and than GPTQ, deterministic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gossamer.compress.blockview import BlockView
from gossamer.compress.blockwise import Start, block_error
from gossamer.compress.quantize.grid import grid_of
from gossamer.compress.quantize.signround import FACTORS, OffsetWeight, SignRound, SignRoundOptions
from gossamer.formats import Integer
from random_blocks import make_block, make_view


def learned(form: Integer, **options: Any) -> BlockView:
    view = make_view(make_block(), form)
    SignRound(SignRoundOptions(**options)).compress(view)
    return view


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_rounding_is_closer_to_the_original_than_gptq(bits: int, symmetric: bool) -> None:
    form = Integer(bits, 32, symmetric)
    gptq = block_error(learned(form, steps=0), dict)
    assert block_error(learned(form, steps=40), dict) < (0.9 if bits < 4 else 1.0) * gptq


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_no_training_ends_worse_than_it_began(start: str) -> None:
    form = Integer(3, 16)
    before = block_error(learned(form, steps=0, start=start), dict)
    for options in ({"steps": 1}, {"steps": 2, "learning_rate": 100.0}, {"steps": 20}):
        assert block_error(learned(form, start=start, **options), dict) <= before * (1 + 1e-6)


def test_equal_seeds_give_equal_codes() -> None:
    form = Integer(3, 32, symmetric=False)
    first, again = learned(form, steps=10), learned(form, steps=10)
    for role in first.roles:
        assert torch.equal(first.decided[role].codes, again.decided[role].codes)
        assert torch.equal(first.decided[role].scale, again.decided[role].scale)
        assert torch.equal(form.unpack(form.pack(first.decided[role])), first.decided[role].dequantize())


def test_offsets_from_rounding_move_no_code_further_than_up_or_down() -> None:
    form = Integer(4, 32)
    view, plain = learned(form, steps=40, start="rtn", clip_rate=0.0), make_block()
    for role in view.roles:
        weight = getattr(plain, role).weight
        scale = view.decided[role].scale
        assert torch.equal(scale, grid_of(weight, form)[0])  # fixed ranges
        exact = weight.view(*scale.shape, -1) / scale.unsqueeze(-1)
        codes = view.decided[role].codes.view_as(exact)
        assert ((codes >= exact.floor().clamp(-8, 7)) & (codes <= exact.ceil().clamp(-8, 7))).all()
        nearest = exact.round().clamp(-8, 7)
        assert 0.01 < (codes != nearest).float().mean() < 0.5  # some did move


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rounded_weight_is_the_formula_of_the_paper(symmetric: bool) -> None:
    form = Integer(3, 16, symmetric)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 32, generator=generator)
    scale, zero = grid_of(weight, form)
    layer = OffsetWeight(Start(form, weight, scale, None if symmetric else zero))
    with torch.no_grad():
        layer.offset.uniform_(-0.5, 0.5, generator=generator)
        for factor in layer.factors:
            factor.uniform_(*FACTORS, generator=generator)
    low, high = -4, 3
    s, z = scale.double().numpy(), zero.double().numpy()
    if symmetric:
        s = s * layer.factors[0].detach().double().numpy()
    else:
        upper = (high - z) * s * layer.factors[0].detach().double().numpy()
        lower = (low - z) * s * layer.factors[1].detach().double().numpy()
        s = (upper - lower) / (high - low)
        z = np.clip(np.rint(low - lower / s), low, high)
    s = torch.from_numpy(s).to(torch.bfloat16).double().numpy()
    s, z = s.repeat(16, 1), z.repeat(16, 1)
    v = layer.offset.detach().double().numpy()
    wanted = (np.clip(np.rint(weight.double().numpy() / s + z + v), low, high) - z) * s
    np.testing.assert_allclose(layer.codes().dequantize().numpy(), wanted, atol=1e-6)
    assert torch.equal(layer.weight(), layer.codes().dequantize())


@pytest.mark.parametrize("options", [{"learning_rate": 0.0}, {"clip_rate": -0.1}, {"step": 3}, {"batch_size": 0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SignRoundOptions(**options)
