"""Folding changes a block's weights and nothing that the block computes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from gossamer.compress.blockview import POINTS
from gossamer.compress.quantize.fold import fold, foldable
from gossamer.errors import NumericalError
from random_blocks import FFN, HEAD_DIM, HIDDEN, make_block, make_inputs, make_rotation, wide_norms

WIDTHS = {"q": HIDDEN, "o": 64, "gate": HIDDEN, "down": FFN}


def random_scale(roles: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(roles))
    return torch.exp(torch.randn(WIDTHS[roles[0]], generator=generator) * 1.5).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("roles", POINTS)
def test_a_block_in_float64_computes_the_same_after_a_folding(
    roles: tuple[str, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide_norms(monkeypatch)
    block = make_block(bias=bias, dtype=torch.float64)
    x, rotation = make_inputs(dtype=torch.float64), make_rotation()
    before = deepcopy(block)
    fold(block, roles, random_scale(roles, torch.float64))
    assert not torch.equal(getattr(block, roles[0]).weight, getattr(before, roles[0]).weight)
    expected = before(x, rotation)
    assert (block(x, rotation) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_all_foldings_together_change_a_block_in_float32_by_rounding_alone() -> None:
    block, x, rotation = make_block(bias=True), make_inputs(), make_rotation()
    expected = deepcopy(block)(x, rotation)
    for roles in POINTS:
        fold(block, roles, random_scale(roles, torch.float32))
    assert (block(x, rotation) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("roles", POINTS)
def test_the_folded_scale_is_the_one_that_divides_the_inputs(roles: tuple[str, ...]) -> None:
    block = make_block(bias=True)
    before = deepcopy(block)
    scale = random_scale(roles, torch.float32)
    folded = fold(block, roles, scale)
    assert torch.equal(folded, foldable(before, roles, scale))
    for role in roles:
        assert torch.equal(getattr(block, role).weight, getattr(before, role).weight * folded)
    if roles == ("o",):
        heads = folded.view(2, 2, HEAD_DIM)
        assert torch.equal(heads[:, 0], heads[:, 1])
        mean = scale.view(2, 2, HEAD_DIM).prod(1).sqrt()
        assert (heads[:, 0] / mean - 1).abs().max() < 0.004
    else:
        assert (folded / scale - 1).abs().max() < 0.004


@pytest.mark.parametrize("roles", POINTS)
def test_norms_and_biases_stay_numbers_of_bfloat16(roles: tuple[str, ...]) -> None:
    block = make_block(bias=True)
    fold(block, roles, random_scale(roles, torch.float32))
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, parameter.bfloat16().float()), name


def test_a_norm_weight_of_zero_stays_zero() -> None:
    block = make_block()
    block.attn_norm.weight[5] = 0
    x, rotation = make_inputs(), make_rotation()
    expected = deepcopy(block)(x, rotation)
    fold(block, ("q", "k", "v"), random_scale(("q", "k", "v"), torch.float32))
    assert block.attn_norm.weight[5] == 0
    assert (block(x, rotation) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_divide_is_a_typed_error_and_changes_nothing(bad: float) -> None:
    block = make_block()
    before = deepcopy(block)
    scale = torch.ones(FFN)
    scale[7] = bad
    with pytest.raises(NumericalError, match="down of block 0"):
        fold(block, ("down",), scale)
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), before.parameters(), strict=True))
