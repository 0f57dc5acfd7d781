"""Guesses and what they are worth: prompt look-up by its definition, and a controller that is shown worlds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_doubles import CheckedBackend, ContextBackend, answer, generate, make_engine
from gossamer.engine.fake import FakeBackend, fake_config
from gossamer.engine.params import SamplingParams
from gossamer.engine.sampler import Sampler
from gossamer.engine.scheduler import Piece
from gossamer.engine.sequence import Output, Sequence, Token
from gossamer.engine.speculative import Speculator
from gossamer.engine.speculative import speculator as controller
from gossamer.engine.speculative.draft_model import DraftModel
from gossamer.engine.speculative.ngram import LONGEST, SHORTEST, NgramDrafter
from gossamer.engine.speculative.speculator import PRIOR_HITS, PRIOR_TRIALS, Costs, Rate


class NoText:
    """A stream of tokens that have no text."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def decoding(prompt: list[int], limit: int = 1 << 20, name: str = "a") -> Sequence:
    """A sequence whose answer has begun and may have `limit` tokens more: all but the last one is in the cache."""
    sequence = Sequence(prompt[:-1], SamplingParams(), limit + 1, (), NoText(), request_id=name)
    sequence.push(prompt[-1])
    sequence.computed = len(prompt) - 1
    return sequence


class TestNgram:
    def guess(self, drafter: NgramDrafter, sequence: Sequence, count: int) -> list[int]:
        return drafter.propose([sequence], [Sampler(sequence.params, [], 0)], count)[0]

    @given(
        st.lists(st.integers(0, 2), min_size=1, max_size=40),
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=6),
        st.integers(1, 15),
    )
    def test_it_is_what_followed_the_latest_place_like_this(self, prompt, more, count):
        """As text comes in pieces, it is what a search through all of it would find."""
        drafter, sequence = NgramDrafter(), decoding(prompt)
        for piece in [[], *more]:
            sequence.ids += piece
            assert self.guess(drafter, sequence, count) == self.searched(sequence.ids, count)

    def searched(self, ids: list[int], count: int) -> list[int]:
        for size in range(LONGEST, SHORTEST - 1, -1):
            for end in range(len(ids) - 1, size - 1, -1):
                if len(ids) > size and ids[end - size : end] == ids[-size:]:
                    known = list(ids)
                    for at in range(end, end + count):
                        known.append(known[at])
                    return known[len(ids) :]
        return []

    def test_a_loop_goes_on(self):
        assert self.guess(NgramDrafter(), decoding([7, 1, 2, 3, 1, 2, 3, 1, 2]), 7) == [3, 1, 2, 3, 1, 2, 3]

    def test_the_longest_match_counts_before_the_latest(self):
        assert self.guess(NgramDrafter(), decoding([5, 1, 2, 3, 8, 0, 2, 3, 9, 5, 1, 2, 3]), 1) == [8]

    def test_nothing_like_it_is_no_guess(self):
        assert self.guess(NgramDrafter(), decoding(list(range(30))), 5) == []
        assert self.guess(NgramDrafter(), decoding([1]), 5) == []

    def test_sequences_do_not_guess_from_each_other_and_are_forgotten(self):
        drafter = NgramDrafter()
        first, second = decoding([1, 2, 3, 1, 2]), decoding([1, 2])
        assert drafter.propose([first, second], [None, None], 1) == [[3], []]
        drafter.forget(first)
        drafter.forget(first)
        assert list(drafter._indexes) == [second]
        assert drafter.propose([first], [None], 1) == [[3]]
        assert drafter.behind([first, second]) == 0.0


class TestRate:
    def test_it_goes_to_what_is_seen_and_later_trials_count_more(self):
        rate = Rate()
        assert rate.chance == pytest.approx(PRIOR_HITS / PRIOR_TRIALS)
        for _ in range(100):
            rate.note(1, 4)
        assert rate.chance == pytest.approx(0.25, abs=0.01)
        for _ in range(100):
            rate.note(4, 4)
        assert rate.chance > 0.9

    def test_it_is_never_certain(self):
        assert Rate(5, 5).chance == 0.99
        assert Rate(0, 0).chance == 0.0


class TestCosts:
    def test_between_two_known_sizes_it_is_in_proportion(self):
        costs = Costs()
        assert costs.of(4) is None
        costs.note(2, 1.0)
        costs.note(10, 5.0)
        assert costs.of(2) == 1.0
        assert costs.of(6) == pytest.approx(3.0)
        assert costs.of(1) == 1.0
        assert costs.of(20) >= 5.0

    def test_what_was_measured_lately_counts_but_one_outlier_does_not_rule(self):
        costs = Costs()
        for _ in range(30):
            costs.note(4, 1.0)
        costs.note(4, 10.0)
        assert 1.0 < costs.of(4) < 5.0
        for _ in range(30):
            costs.note(4, 2.0)
        assert costs.of(4) == pytest.approx(2.0, rel=0.01)

    @pytest.mark.parametrize("tokens", [1, 16, 17, 33, 100, 511])
    def test_large_sizes_that_hardly_differ_are_one(self, tokens):
        costs = Costs()
        costs.note(tokens, 3.0)
        assert costs.of(tokens) == 3.0
        for other in range(tokens + 1):
            same = controller._bucket(other) == controller._bucket(tokens)
            assert not same or tokens - other < max(1, tokens / 8)
            assert controller._bucket(other) <= other


@dataclass
class World:
    """Steps whose cost and whose drafts' worth are given; it shows a speculator what an engine would."""

    chance: float
    cost: Callable[[int], float]
    """Seconds of a step of so many tokens."""
    size: int = 1
    """Sequences that decode."""
    speculator: Speculator = field(init=False)
    tokens: int = 0
    seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)
    """Drafts of each step."""
    name = "world"
    most = 8

    def __post_init__(self) -> None:
        self.speculator = Speculator(self)
        self.sequences = [decoding([1], name=str(i)) for i in range(self.size)]
        self.rng = np.random.default_rng(0)

    def propose(self, sequences, samplers, count):
        return [[0] * count for _ in sequences]

    def behind(self, sequences):
        return 0.0

    def forget(self, sequence):
        """Nothing is remembered of a sequence."""

    def run(self, steps: int) -> None:
        samplers = {s: Sampler(s.params, [], 0) for s in self.sequences}
        for _ in range(steps):
            for sequence in self.sequences:
                sequence.drafts = []
            self.speculator.propose(self.sequences, samplers)
            made = {s: len(s.drafts) for s in self.sequences}
            outputs = [Output(s.request_id, 0, (Token("", 0),) * (1 + self.right(made[s]))) for s in self.sequences]
            fed = sum(1 + count for count in made.values())
            self.speculator.observe([Piece(s, 1) for s in self.sequences], outputs, made, self.cost(fed))
            self.drafted.append(sum(made.values()))
            self.tokens += sum(len(output.tokens) for output in outputs)
            self.seconds += self.cost(fed)

    def right(self, made: int) -> int:
        wrong = np.flatnonzero(self.rng.random(made) >= self.chance)
        return int(wrong[0]) if len(wrong) else made


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time does not pass while drafts are made: worlds say themselves what steps cost."""
    monkeypatch.setattr(controller.time, "perf_counter", lambda: 0.0)


class TestController:
    def test_where_drafts_are_free_and_good_many_are_made(self):
        world = World(0.9, lambda tokens: 1.0)
        world.run(200)
        assert world.speculator.active
        assert world.tokens / world.seconds > 4.5  # 6.1 with 8 drafts each time
        assert np.median(world.drafted) >= 6

    @pytest.mark.parametrize("chance", [0.0, 0.1, 0.5])
    def test_where_each_token_costs_the_same_none_are_made(self, chance):
        world = World(chance, lambda tokens: float(tokens))
        world.run(600)
        assert not world.speculator.active
        assert world.tokens / world.seconds > 0.93  # 1 without any
        assert world.drafted.count(0) > 550

    @pytest.mark.parametrize("chance", [0.2, 0.5, 0.8, 0.95])
    @pytest.mark.parametrize("slope", [0.02, 0.2, 0.6])
    @pytest.mark.parametrize("size", [1, 6])
    def test_it_comes_near_the_best_number_of_drafts(self, chance, slope, size):
        def cost(tokens: int) -> float:
            return 1.0 + slope * tokens

        world = World(chance, cost, size)
        world.run(1000)
        tokens = [size * sum(chance**i for i in range(count + 1)) for count in range(World.most + 1)]
        rates = [made / cost(size * (1 + count)) for count, made in enumerate(tokens)]
        assert world.tokens / world.seconds > 0.88 * max(rates)
        assert world.tokens / world.seconds > 0.94 * rates[0]

    def test_drafts_that_become_good_are_found_and_bad_ones_given_up(self):
        world = World(0.0, lambda tokens: 1.0 + 0.1 * tokens)
        world.run(300)
        assert not world.speculator.active
        world.chance = 0.9
        world.run(1500)
        assert world.speculator.active
        world.chance = 0.0
        world.drafted.clear()
        world.run(300)
        assert not world.speculator.active
        assert world.drafted.count(0) > 230

    def test_trials_become_rare(self):
        world = World(0.0, lambda tokens: float(tokens))
        world.run(3000)
        tried = np.flatnonzero(world.drafted)
        gaps = np.diff(tried)
        assert gaps[gaps > 1].max() >= 500
        assert len(tried) < 60

    def test_while_it_speculates_the_other_way_is_measured_too(self):
        world = World(0.9, lambda tokens: 1.0)
        world.run(300)
        assert 5 < world.drafted.count(0) < 30

    def test_forced_it_never_stops(self):
        world = World(0.0, lambda tokens: float(tokens))
        world.speculator = Speculator(world, most=3, adaptive=False)
        world.run(50)
        assert world.drafted == [3] * 50
        assert (world.speculator.drafted, world.speculator.accepted, world.speculator.acceptance_rate) == (150, 0, 0.0)

    def test_it_says_when_it_changes_its_mind(self, caplog):
        with caplog.at_level(logging.INFO, "gossamer.engine"):
            world = World(0.0, lambda tokens: float(tokens))
            world.run(50)
        assert "speculation by world is off, for it would be slower" in caplog.messages[0]
        assert world.speculator.acceptance_rate in (None, 0.0)

    def test_steps_that_read_prompts_say_nothing_about_costs(self):
        world = World(0.5, lambda tokens: 1.0)
        sequence = world.sequences[0]
        world.speculator.observe([Piece(sequence, 40)], [], {}, 99.0)
        assert world.speculator._costs.of(1) is None

    def test_counts_are_those_of_the_outputs(self):
        world = World(0.5, lambda tokens: 1.0)
        world.run(100)
        speculator = world.speculator
        assert speculator.drafted == sum(world.drafted)
        assert speculator.accepted == world.tokens - 100
        assert speculator.acceptance_rate == speculator.accepted / speculator.drafted


@dataclass
class Prompts(World):
    """A world in which answers follow each other, with drafts that take time and read the prompt first."""

    draft: float = 0.0
    """Seconds of a draft, where a step without drafts takes one."""
    late: int = 0
    """Tokens that the drafter has not read."""
    clock: float = 0.0

    def propose(self, sequences, samplers, count):
        self.clock += self.behind(sequences) + self.draft * count
        self.late = 0
        return super().propose(sequences, samplers, count)

    def behind(self, sequences):
        return 0.002 * self.late

    def answer(self, chance: float, tokens: int = 160) -> float:
        """Tokens a second of an answer whose drafts have this chance."""
        self.chance, self.late = chance, 60
        self.speculator.forget(self.sequences[0])
        self.sequences = [decoding([1])]
        before, began = self.tokens, self.seconds + self.clock
        while self.tokens < before + tokens:
            known = self.tokens
            self.run(1)
            self.late += self.tokens - known
        return (self.tokens - before) / (self.seconds + self.clock - began)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("draft", "slope", "chances", "least"),
    [
        (0.5, 0.08, [0.7, 0.8, 0.85, 0.75, 0.65, 0.9], 1.0),  # as 8 bits with a draft of 4
        (0.52, 0.08, [0.6, 0.7, 0.8, 0.7, 0.6, 0.8], 0.98),  # where nothing is to be gained
        (0.28, 0.06, [0.7, 0.8, 0.85, 0.75, 0.65, 0.9], 1.3),  # as bfloat16 with a draft of 4 bits
        (0.0, 0.08, [0.2, 0.1, 0.6, 0.3, 0.5, 0.4], 1.15),  # as prompt look-up
    ],
)
def test_no_prompt_loses_what_others_gain(monkeypatch, seed, draft, slope, chances, least):
    noise = np.random.default_rng(seed)
    world = Prompts(0.5, lambda fed: (1 + slope * (fed - 1)) * (1 + 0.08 * noise.standard_normal()), draft=draft)
    monkeypatch.setattr(controller.time, "perf_counter", lambda: world.clock)
    rounds = np.array([[world.answer(chance) for chance in chances] for _ in range(8)])[1:]
    assert np.median(rounds, axis=0).min() > 0.96
    assert np.median(rounds) > least


class TestDrafts:
    def propose(self, sequence: Sequence, matcher: object = None) -> list[int]:
        world = World(1.0, lambda tokens: 1.0)
        world.speculator = Speculator(world, adaptive=False)
        world.speculator.propose([sequence], {sequence: Sampler(sequence.params, [], 0, matcher)})
        return sequence.drafts

    @pytest.mark.parametrize(("limit", "count"), [(1, 0), (2, 1), (8, 7), (9, 8), (100, 8)])
    def test_the_last_token_of_an_answer_has_none(self, limit, count):
        assert len(self.propose(decoding([1, 2], limit))) == count

    def test_a_grammar_cuts_them(self):
        class Three:
            def allowed(self, tokens: list[int]) -> int:
                return min(3, len(tokens))

        assert len(self.propose(decoding([1, 2]), Three())) == 3

    def test_sequences_that_read_their_prompts_have_none(self):
        sequence = decoding([1, 2, 3])
        sequence.computed = 0
        assert self.propose(sequence) == []


def test_what_ended_is_forgotten_though_its_last_step_had_drafts():
    engine = make_engine(CheckedBackend(), speculator=Speculator(NgramDrafter(), adaptive=False))
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    generate(engine, {str(i): ([*range(20), 0, 1], params) for i in range(5)})
    assert engine.stats().accepted_tokens > 0
    assert not engine.speculator._rates
    assert not engine.speculator.drafter._indexes


class TestDraftModel:
    """A drafter with a cache of its own, over a backend that knows whether that is right."""

    def engine(
        self, draft: FakeBackend, target: CheckedBackend, blocks: int = 60, most: int | None = None, **options: int
    ):
        self.drafter = DraftModel(draft, blocks)
        return make_engine(target, blocks, speculator=Speculator(self.drafter, most, adaptive=False), **options)

    def check(self, engine, requests: dict) -> None:
        for (name, _), found in generate(engine, requests).items():
            assert found.answer == answer(engine.backend, *requests[name])
        assert not self.drafter._places
        assert self.drafter._blocks.used == 0

    @pytest.mark.parametrize("options", [{}, {"batch_tokens": 5, "sequences": 3}, {"blocks": 12}])
    def test_every_guess_of_the_model_itself_is_right(self, options):
        engine = self.engine(ContextBackend(spread=2.0), ContextBackend(spread=2.0), **options)
        params = SamplingParams(max_tokens=60, temperature=0.7, seed=4, presence_penalty=0.5, ignore_eos=True)
        self.check(engine, {str(i): ([i] * 20, params) for i in range(6)})
        stats = engine.stats()
        assert stats.drafted_tokens == stats.accepted_tokens > 100
        assert ("blocks" in options) == (stats.preemptions > 0)

    def test_it_guesses_up_to_the_end_of_the_context(self):
        engine = self.engine(FakeBackend(fake_config(max_positions=64)), CheckedBackend(max_positions=64))
        self.check(engine, {"a": (list(range(40)), SamplingParams(max_tokens=100, ignore_eos=True))})
        assert engine.stats().accepted_tokens >= 18

    def test_a_shorter_context_than_the_models_is_no_obstacle(self):
        engine = self.engine(FakeBackend(fake_config(max_positions=30)), CheckedBackend(max_positions=64))
        self.check(engine, {"a": (list(range(20)), SamplingParams(max_tokens=100, ignore_eos=True))})
        assert engine.stats().accepted_tokens > 0

    def test_one_that_is_broken_costs_guesses_not_answers(self):
        class Broken(FakeBackend):
            def forward(self, batch):
                logits = super().forward(batch)
                logits[batch.tokens[batch.logit_rows] == 50] = math.nan
                return logits

        engine = self.engine(Broken(fake_config()), CheckedBackend())
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        self.check(engine, {"a": ([40], params), "b": ([10], params)})
        assert engine.stats().accepted_tokens > 30

    @pytest.mark.parametrize("most", [1, 3, 6])
    def test_wrong_guesses_leave_nothing_behind_in_its_cache(self, most):
        """What it reads is what its sequences hold, and then its own guesses, in a pool that is too small for all."""

        class Reads(ContextBackend):
            def _check_context(self, sequence, tokens):
                read = tokens.tolist()
                known = [s.ids for s in engine.scheduler.running]
                assert any(read == ids[: len(read)] or read[:-most] == ids[: len(read) - most] for ids in known)
                super()._check_context(sequence, tokens)

        engine = self.engine(Reads(spread=1.0), ContextBackend(spread=0.0), 12, most, batch_tokens=9, sequences=4)
        params = SamplingParams(max_tokens=50, temperature=0.5, seed=1, ignore_eos=True)
        self.check(engine, {str(i): ([i] * 20, params) for i in range(5)})
        stats = engine.stats()
        assert stats.preemptions > 0
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
