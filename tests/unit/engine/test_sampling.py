"""Draws at quantiles: the distributions are right."""

from __future__ import annotations

import pytest
import torch

from gossamer.engine.sampling import draw, require_finite, scaled
from gossamer.errors import EngineError

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def test_draws_follow_the_distribution():
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = draw(LOGITS.expand(n, -1), uniform).bincount(minlength=4) / n
    # Five standard deviations of a share of n draws.
    assert (counts - LOGITS.exp()).abs().max() < 5 * 0.5 / n**0.5


def test_a_draw_is_the_quantile_of_the_distribution():
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999])
    assert draw(LOGITS.expand(6, -1), uniform).tolist() == [0, 0, 1, 1, 2, 3]


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(draw(logits.expand(1001, -1), torch.linspace(0, 1 - 2**-24, 1001)).tolist()) == {1, 3}


def test_at_temperature_1_scaling_changes_no_probability():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(2)) * 8
    assert torch.equal(scaled(logits, 1.0).softmax(-1), logits.softmax(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_not_a_token(bad):
    logits = LOGITS.clone()
    logits[1] = bad
    with pytest.raises(EngineError, match="not finite"):
        require_finite(logits.unsqueeze(0))
