"""From logits to tokens: the distributions are right, and a request does not feel its neighbours."""

from __future__ import annotations

import pytest
import torch

from gossamer.engine.params import SamplingParams
from gossamer.engine.sampling import Sampler, draw, sample, scaled, truncate
from gossamer.errors import EngineError

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def kept(**fields: object) -> list[int]:
    tokens = truncate(LOGITS[[2, 0, 3, 1]], SamplingParams(**fields))[1]
    return [[2, 0, 3, 1][t] for t in tokens]


def test_zero_temperature_takes_the_likeliest():
    assert sample(torch.stack([LOGITS, LOGITS.flip(0)]), [Sampler(SamplingParams())] * 2) == [0, 3]


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.25}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 2]),
    ],
)
def test_truncation_keeps_the_likeliest(fields, tokens):
    assert kept(temperature=1.0, **fields) == tokens


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


def test_low_temperature_sharpens():
    sampler = Sampler(SamplingParams(temperature=0.05, seed=0))
    assert {sampler.sample(LOGITS) for _ in range(50)} == {0}


@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 1e-50, 5e-324])
@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_tiny_temperature_takes_the_likeliest(temperature, fields):
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0, **fields))
    assert {sampler.sample(LOGITS[[2, 0, 3, 1]] * 1e3) for _ in range(20)} == {1}


def test_at_temperature_1_scaling_changes_no_probability():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(2)) * 8
    assert torch.equal(scaled(logits, 1.0).softmax(-1), logits.softmax(-1))


def test_the_same_seed_draws_the_same_whatever_else_is_in_the_batch():
    noise = torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    alone, mine = Sampler(params), Sampler(params)
    others = [Sampler(SamplingParams(temperature=1.0, seed=s)) for s in (6, 7)]
    a = [alone.sample(step[1]) for step in noise]
    b = [sample(step, [others[0], mine, others[1]])[1] for step in noise]
    assert a == b
    assert a != [Sampler(SamplingParams(temperature=1.0, top_p=0.9, seed=8)).sample(step[1]) for step in noise]


def test_no_seed_draws_afresh():
    rows = torch.zeros(8, 1000)
    first, second = ([Sampler(SamplingParams(temperature=1.0)).sample(r) for r in rows] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_not_a_token(bad):
    logits = LOGITS.clone()
    logits[1] = bad
    with pytest.raises(EngineError, match="not finite"):
        sample(logits.unsqueeze(0), [Sampler(SamplingParams())])
