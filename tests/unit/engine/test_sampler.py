"""What requests do to their logits, row by row: the documented formulas, whatever else is in the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_doubles import EOS, VOCAB, adjusted
from gossamer.engine.draw import sample_row
from gossamer.engine.params import Grammar, SamplingParams
from gossamer.engine.sampler import Sampler, draw_rows, finite_rows, token_logprobs


def logits(seed: int = 0, rows: int | None = None) -> torch.Tensor:
    shape = (VOCAB,) if rows is None else (rows, VOCAB)
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, shape)).float()


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)


class TestAdjust:
    @given(
        prompt=TOKENS,
        generated=TOKENS,
        drafts=TOKENS,
        presence=st.sampled_from([0.0, 0.7, -2.0]),
        frequency=st.sampled_from([0.0, 0.3, -1.5]),
        repetition=st.sampled_from([1.0, 1.3, 0.5]),
        bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4),
        min_tokens=st.integers(0, 25),
        seed=st.integers(0, 5),
    )
    def test_it_is_the_formula(
        self, prompt, generated, drafts, presence, frequency, repetition, bias, min_tokens, seed
    ):
        params = SamplingParams(
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            logit_bias=bias,
            min_tokens=min_tokens,
        )
        found, sampler = logits(seed), Sampler(params, prompt, 0)
        sampler.adjust(found, generated, drafts, [EOS, 3])
        expected = adjusted(logits(seed), params, prompt, [*generated, *drafts], [EOS, 3])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        if not torch.equal(expected, logits(seed)):
            assert sampler.adjusts

    @pytest.mark.parametrize(
        "fields", [{}, {"temperature": 1.0, "top_p": 0.5, "seed": 1}, {"stop": "a"}, {"logprobs": 3}, {"n": 3}]
    )
    def test_what_changes_no_logit_says_so(self, fields):
        assert not Sampler(SamplingParams(**fields), [1], 0).adjusts

    def test_penalties_by_hand(self):
        found = torch.tensor([2.0, -2.0, 1.0, 1.0, 0.0])
        params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
        Sampler(params, [0, 1], 0).adjust(found, [2, 2], [3], [])
        assert found.tolist() == [1.0, -4.0, 0.5 - 0.5 - 0.5, 0.5 - 0.5 - 0.25, 0.0]

    def test_logits_that_are_impossible_stay_so(self):
        found = logits()
        found[7] = -math.inf
        params = SamplingParams(repetition_penalty=0.5, presence_penalty=-2.0, logit_bias={7: 100.0})
        Sampler(params, [7], 0).adjust(found, [7], [], [])
        assert float(found[7]) == -math.inf
        assert found.isfinite().sum() == VOCAB - 1


class Countdown:
    """A grammar of tokens 9, 8, ... 0."""

    def __init__(self, state: int = 9) -> None:
        self.state = state

    @property
    def finished(self) -> bool:
        return self.state < 0

    def copy(self) -> Countdown:
        return Countdown(self.state)

    def accept(self, token: int) -> None:
        assert token == self.state
        self.state -= 1

    def mask(self, logits: torch.Tensor) -> None:
        logits[torch.arange(len(logits)) != self.state] = -math.inf


class TestGrammar:
    params = SamplingParams(grammar=Grammar("regex", "9876543210"))

    def test_drafts_do_not_change_its_state(self):
        sampler = Sampler(self.params, [1], 0, Countdown())
        assert sampler.adjusts
        for drafts, expected in (([9, 8], 7), ([], 9), ([9], 8)):
            found = logits()
            sampler.adjust(found, [], drafts, [])
            assert (int(found.argmax()), int(found.isfinite().sum())) == (expected, 1)

    def test_tokens_that_are_drawn_do(self):
        sampler = Sampler(self.params, [1], 0, Countdown(1))
        sampler.accept(1)
        found = logits()
        sampler.adjust(found, [1], [], [])
        assert int(found.argmax()) == 0
        sampler.accept(0)
        sampler.accept(5)  # it has ended: anything may follow


class TestDraw:
    def test_each_row_is_drawn_as_if_alone(self):
        """Greedy and sampled rows mixed, at any positions, in any order."""
        each = [
            SamplingParams(),
            SamplingParams(temperature=0.8),
            SamplingParams(temperature=1.5, top_k=1),
            SamplingParams(temperature=1.0, top_p=0.7),
            SamplingParams(temperature=2.0, top_k=5, min_p=0.1),
        ] * 3
        samplers = [Sampler(params, [1], seed) for seed, params in enumerate(each)]
        positions = [3 * i for i in range(len(each))]
        rows = logits(rows=len(each))
        expected = [
            int(row.argmax())
            if p.greedy
            else sample_row(row, p.temperature, p.top_k, p.top_p, p.min_p, sampler.seed, position)
            for row, p, sampler, position in zip(rows, each, samplers, positions, strict=True)
        ]
        assert draw_rows(rows, samplers, positions) == expected
        order = np.random.default_rng(0).permutation(len(each)).tolist()
        shuffled = draw_rows(rows[order], [samplers[i] for i in order], [positions[i] for i in order])
        assert shuffled == [expected[i] for i in order]
        for i, sampler in enumerate(samplers):
            assert draw_rows(rows[i : i + 1], [sampler], positions[i : i + 1]) == expected[i : i + 1]

    def test_seed_and_position_both_matter(self):
        rows = torch.zeros(1, VOCAB)
        params = SamplingParams(temperature=1.0)
        by_seed = {draw_rows(rows, [Sampler(params, [1], seed)], [0])[0] for seed in range(30)}
        by_position = {draw_rows(rows, [Sampler(params, [1], 0)], [at])[0] for at in range(30)}
        assert min(len(by_seed), len(by_position)) > 15


def test_a_row_is_finite_if_it_has_a_likeliest_token():
    rows = logits(rows=5)
    rows[1, 4], rows[2, 4], rows[3, 4], rows[4] = math.nan, math.inf, -math.inf, -math.inf
    assert finite_rows(rows) == [True, False, False, True, False]


@pytest.mark.parametrize("count", [0, 1, 5, 20, VOCAB, VOCAB + 7])
def test_log_probabilities_are_told_of_the_token_and_of_the_likeliest(count):
    values = logits().double().log_softmax(-1)
    told = token_logprobs(values, 42, count)
    assert told.logprob == float(values[42])
    order = sorted(range(VOCAB), key=lambda token: -float(values[token]))[:count]
    assert told.top == tuple((token, float(values[token])) for token in order)
