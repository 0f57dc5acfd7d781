"""EfficientQAT's block-wise phase: better than its start and than GPTQ, deterministic, options checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gossamer.compress.blockview import BlockView
from gossamer.compress.blockwise import block_error, start_from
from gossamer.compress.quantize.efficientqat import EfficientQAT, EfficientQATOptions, TrainedWeight
from gossamer.compress.quantize.grid import grid_of, quantize
from gossamer.formats import Integer
from random_blocks import make_block, make_view


def learned(form: Integer, bias: bool = False, seed: int = 0, **options: Any) -> BlockView:
    view = make_view(make_block(bias=bias), form)
    view.generator.manual_seed(seed)
    EfficientQAT(EfficientQATOptions(**options)).compress(view)
    return view


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_trained_block_is_closer_to_the_original_than_the_codes_of_gptq(bits: int, symmetric: bool) -> None:
    form = Integer(bits, 32, symmetric)
    gptq = block_error(learned(form, steps=0), dict)  # no step: the start is what is stored
    trained = block_error(learned(form, steps=40), dict)
    assert trained < (0.8 if bits < 4 else 0.95) * gptq


def test_products_in_bfloat16_teach_about_as_much() -> None:
    form = Integer(3, 32)
    before, exact, rough = (
        learned(form, steps=steps, precision=precision)
        for steps, precision in ((0, "float32"), (40, "float32"), (40, "bfloat16"))
    )
    start, reached, near = (block_error(view, dict) for view in (before, exact, rough))
    assert start - near > 0.9 * (start - reached) > 0
    assert any(not torch.equal(exact.decided[role].codes, rough.decided[role].codes) for role in exact.roles)


def test_no_step_stores_the_start() -> None:
    form = Integer(3, 32)
    view = learned(form, steps=0, start="rtn")
    weight = make_block().gate.weight
    assert torch.equal(view.decided["gate"].codes, quantize(weight, *grid_of(weight, form), form).codes)


def test_training_from_rounding_never_ends_worse() -> None:
    form = Integer(3, 16)
    before = block_error(learned(form, steps=0, start="rtn"), dict)
    assert block_error(learned(form, steps=30, start="rtn"), dict) < before
    wild = learned(form, steps=3, start="rtn", learning_rate=1e6)
    assert block_error(wild, dict) <= before * (1 + 1e-6)


def test_equal_seeds_give_equal_codes_and_others_do_not() -> None:
    form = Integer(2, 32, symmetric=False)
    first, again, other = (learned(form, steps=10, seed=seed) for seed in (0, 0, 1))
    for role in first.roles:
        assert torch.equal(first.decided[role].codes, again.decided[role].codes)
        assert torch.equal(first.decided[role].scale, again.decided[role].scale)
    assert any(not torch.equal(first.decided[r].codes, other.decided[r].codes) for r in first.roles)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_what_the_format_stores_and_what_was_trained(symmetric: bool) -> None:
    form = Integer(3, 32, symmetric)
    view = learned(form, steps=10, bias=True)
    for role, codes in view.decided.items():
        assert torch.equal(form.unpack(form.pack(codes)), getattr(view.block, role).weight)


def test_weights_move_in_steps_of_their_group_and_scales_by_factors() -> None:
    form = Integer(4, 16)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    layer = TrainedWeight(start_from(weight, quantize(weight, *grid_of(weight, form), form), form))
    before, begun = layer.codes(), layer.steps.detach().clone()
    with torch.no_grad():
        layer.steps.add_(1.0)
    top = before.codes == 7
    assert torch.equal(layer.codes().codes[~top], before.codes[~top] + 1)
    with torch.no_grad():
        layer.steps.copy_(begun)
        layer.log_scale.fill_(torch.tensor(2.0).log())
    assert torch.equal(layer.codes().scale, before.scale * 2)
    assert torch.equal(layer.codes().codes, before.codes)  # weights move with their grid


def test_zero_inputs_and_zero_weights_are_left_alone() -> None:
    block = make_block()
    block.up.weight.zero_()  # then the input of `down` is zero throughout
    view = make_view(block, Integer(3, 32))
    EfficientQAT(EfficientQATOptions(steps=5, start="rtn")).compress(view)
    assert torch.isfinite(view.block.down.weight).all()
    assert torch.equal(view.block.up.weight, torch.zeros_like(view.block.up.weight))


@pytest.mark.parametrize("options", [{"steps": -1}, {"scale_rate": -1.0}, {"learning_rat": 0.1}, {"start": "awq"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EfficientQATOptions(**options)
