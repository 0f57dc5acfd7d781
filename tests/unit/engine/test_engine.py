"""The engine over backends without a model: every answer is the one that its request alone would have.

`ContextBackend` compares each context with what its blocks hold; `answer` says what must come out, token by token.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter

import numpy as np
import pytest
import torch

from engine_doubles import (
    EOS,
    PREFIXES,
    VOCAB,
    CheckedBackend,
    ContextBackend,
    Received,
    TableDrafter,
    answer,
    collect,
    generate,
    make_engine,
    random_params,
    random_prompt,
)
from gossamer.engine.engine import NOT_FINITE, Engine, EngineOptions
from gossamer.engine.params import Grammar, SamplingParams
from gossamer.engine.speculative import Speculator
from gossamer.engine.speculative.ngram import NgramDrafter
from gossamer.errors import EngineError

SPECULATORS = {
    "none": lambda backend, seed: None,
    "ngram": lambda backend, seed: Speculator(NgramDrafter(), adaptive=False),
    "adaptive": lambda backend, seed: Speculator(NgramDrafter()),
    "table": lambda backend, seed: Speculator(TableDrafter(backend.table, seed), adaptive=False),
}


def choice_seed(seed: int, choice: int) -> int:
    return (seed + choice * 0x9E3779B97F4A7C15) % (1 << 63)


def check_answers(
    backend: CheckedBackend, prompt: list[int], params: SamplingParams, found: list[Received | None]
) -> None:
    """All choices of a request are what they must be, and so are the log-probabilities told with them."""
    for choice, received in enumerate(found):
        assert received is not None
        assert received.answer == answer(backend, prompt, params, choice_seed(params.seed or 0, choice))
        assert {o.prompt_tokens for o in received.outputs} == {len(prompt)}
        check_logprobs(backend, prompt, params, received)


def check_logprobs(backend: CheckedBackend, prompt: list[int], params: SamplingParams, received: Received) -> None:
    text = [*prompt, *received.tokens]
    for i, token in enumerate(received.told):
        if params.logprobs is None:
            assert token.logprobs is None
        else:
            check_one(backend.after(text[: len(prompt) + i]), token.id, params.logprobs, token.logprobs)
    notes = received.outputs[0].prompt_logprobs
    assert all(output.prompt_logprobs is None for output in received.outputs[1:])
    if params.prompt_logprobs is None:
        assert notes is None
        return
    assert notes is not None
    assert len(notes) == len(prompt)
    assert notes[0] is None
    for at in range(1, len(prompt)):
        check_one(backend.after(prompt[:at]), prompt[at], params.prompt_logprobs, notes[at])


def check_one(logits: torch.Tensor, token: int, count: int, told: object) -> None:
    expected = logits.double().log_softmax(-1)
    assert told.logprob == pytest.approx(float(expected[token]), abs=1e-4)
    values, ids = expected.topk(count)
    assert [t for t, _ in told.top] == ids.tolist()
    assert [p for _, p in told.top] == pytest.approx(values.tolist(), abs=1e-4)


class TestUnderLoad:
    """Requests of all kinds come at random times into a cache that is far too small; some are aborted."""

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("speculator", SPECULATORS)
    def test_every_answer_is_that_of_the_request_alone(self, speculator, seed):
        rng = np.random.default_rng([seed, sum(speculator.encode())])
        backend = ContextBackend(max_positions=int(rng.choice([64, 160])), seed=seed)
        engine = make_engine(
            backend,
            int(rng.integers(10, 25)),
            batch_tokens=int(rng.choice([8, 17, 64])),
            sequences=int(rng.integers(1, 9)),
            reuse=seed != 1,
            speculator=SPECULATORS[speculator](backend, seed),
        )
        requests, received, aborted = {}, {}, set()
        while len(requests) < 30 or engine.has_work:
            if len(requests) < 30 and rng.random() < 0.4:
                name, prompt, params = f"r{len(requests)}", random_prompt(rng), random_params(rng)
                requests[name] = prompt, params
                if (reason := add_or_reason(engine, name, prompt, params)) is not None:
                    assert "do not fit" in reason
                    aborted.add(name)
            if rng.random() < 0.05 and requests:
                name = f"r{rng.integers(len(requests))}"
                engine.abort(name)
                assert not engine.holds(name)
                aborted.add(name)
            for output in engine.step():
                assert output.request_id not in aborted
                received.setdefault((output.request_id, output.choice), Received()).take(output)
            if not engine.has_work:
                engine.check_idle()
        served = 0
        for name, (prompt, params) in requests.items():
            found = [received.get((name, choice)) for choice in range(params.n)]
            if name not in aborted:
                check_answers(backend, prompt, params, found)
                served += 1
            elif all(f is not None for f in found) and found[0].finish_reason:  # it had ended before
                assert found[0].answer == answer(backend, prompt, params)
        assert served >= 10
        assert backend.most_tokens <= engine.options.max_batch_tokens
        assert backend.most_sequences <= engine.options.max_sequences
        check_idle_speculator(engine)

    def test_all_that_can_happen_does(self):
        """Else the test above would show nothing."""
        backend = ContextBackend(max_positions=160)
        engine = make_engine(backend, 12, batch_tokens=17, speculator=SPECULATORS["ngram"](backend, 0))
        rng = np.random.default_rng(4)
        for i in range(30):
            add_or_reason(engine, f"r{i}", random_prompt(rng), random_params(rng))
        received = collect(engine)
        stats = engine.stats()
        assert min(stats.preemptions, stats.prefix_hits, stats.accepted_tokens) > 10
        assert stats.drafted_tokens > stats.accepted_tokens
        assert {r.finish_reason for r in received.values()} == {"stop", "length"}
        assert {type(r.stop_reason) for r in received.values()} == {str, int, type(None)}
        assert stats.generated_tokens == sum(len(r.tokens) for r in received.values())

    @pytest.mark.parametrize("budget", [4, 16, 50])
    @pytest.mark.parametrize("drafts", [False, True])
    def test_it_counts(self, budget, drafts):
        backend = CheckedBackend()
        speculator = Speculator(NgramDrafter(), adaptive=False) if drafts else None
        engine = make_engine(backend, 40, batch_tokens=budget, sequences=4, speculator=speculator)
        rng = np.random.default_rng(budget)
        prompts = {f"r{i}": (rng.integers(0, VOCAB, rng.integers(1, 100)).tolist(), 120) for i in range(12)}
        requests = {n: (p, SamplingParams(max_tokens=most, ignore_eos=True)) for n, (p, most) in prompts.items()}
        for (name, _), found in generate(engine, requests).items():
            last = prompts[name][0][-1]
            assert found.tokens == [(last + i) % VOCAB for i in range(1, 121)]
        assert not drafts or engine.stats().accepted_tokens > 0


def add_or_reason(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> str | None:
    try:
        engine.add(name, prompt, params)
    except EngineError as error:
        return error.message
    return None


def check_idle_speculator(engine: Engine) -> None:
    """Nothing is remembered of requests that have ended."""
    if engine.speculator is not None:
        assert not engine.speculator._rates
        drafter = engine.speculator.drafter
        assert not (drafter._indexes if isinstance(drafter, NgramDrafter) else drafter.known)


class TestTheSameTokens:
    """One sampled request, in whatever company."""

    PROMPT = [*PREFIXES[0][:40], 5, 6]
    PARAMS = SamplingParams(max_tokens=60, temperature=1.0, seed=11, ignore_eos=True)

    EXPECTED = answer(ContextBackend(), PROMPT, PARAMS)

    def others(self, count: int) -> dict[str, tuple[list[int], SamplingParams]]:
        rng = np.random.default_rng(count)
        return {f"o{i}": (random_prompt(rng), random_params(rng)) for i in range(count)}

    @pytest.mark.parametrize("budget", [1, 7, 16, 64])
    def test_alone_in_chunks_of_any_size(self, budget):
        engine = make_engine(ContextBackend(), batch_tokens=budget, sequences=1)
        assert generate(engine, {"a": (self.PROMPT, self.PARAMS)})["a", 0].answer == self.EXPECTED

    def test_in_a_batch(self):
        engine = make_engine(ContextBackend(), batch_tokens=30)
        found = generate(engine, self.others(10) | {"a": (self.PROMPT, self.PARAMS)})
        assert found["a", 0].answer == self.EXPECTED

    def test_with_its_beginning_in_the_cache(self):
        engine = make_engine(ContextBackend())
        for hit in (0, 32, 32):
            received = generate(engine, {"a": (self.PROMPT, self.PARAMS)})["a", 0]
            assert received.answer == self.EXPECTED
            assert {output.cached_tokens for output in received.outputs} == {hit}
        assert (engine.stats().prefix_queries, engine.stats().prefix_hits) == (3 * 42, 64)

    def test_after_preemption(self):
        engine = make_engine(ContextBackend(), blocks=9)
        older = SamplingParams(max_tokens=100, ignore_eos=True)
        found = generate(engine, {"old": ([1] * 10, older), "a": (self.PROMPT, self.PARAMS)})
        assert engine.stats().preemptions > 0
        assert found["a", 0].answer == self.EXPECTED

    @pytest.mark.parametrize("speculator", ["ngram", "table", "adaptive"])
    def test_with_speculation(self, speculator):
        backend = ContextBackend()
        engine = make_engine(backend, speculator=SPECULATORS[speculator](backend, 1))
        assert generate(engine, {"a": (self.PROMPT, self.PARAMS)})["a", 0].answer == self.EXPECTED
        assert engine.stats().drafted_tokens > 0

    def test_without_a_seed_they_are_others_each_time(self):
        engine = make_engine(ContextBackend())
        params = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
        found = generate(engine, dict.fromkeys("abc", (self.PROMPT, params)))
        assert len({tuple(r.tokens) for r in found.values()}) == 3


class TestChoices:
    def test_each_has_a_seed_of_its_own_and_the_first_has_the_requests(self):
        backend = ContextBackend()
        engine = make_engine(backend)
        params = SamplingParams(max_tokens=30, temperature=1.0, seed=5, n=4, ignore_eos=True)
        found = generate(engine, {"a": ([1, 2, 3], params)})
        check_answers(backend, [1, 2, 3], params, [found["a", i] for i in range(4)])
        assert len({tuple(found["a", i].tokens) for i in range(4)}) == 4
        assert engine.stats().prompt_tokens == 3

    def test_they_share_the_prompt(self):
        backend = CheckedBackend()
        engine = make_engine(backend, batch_tokens=32)
        found = generate(engine, {"a": ([1] * 100, SamplingParams(max_tokens=2, n=4))})
        assert backend.computed == 96 + 4 * 4 + 4
        assert [found["a", i].outputs[0].cached_tokens for i in range(4)] == [0, 96, 96, 96]

    def test_a_request_lasts_until_all_have_ended(self):
        backend = ContextBackend()
        engine = make_engine(backend)
        engine.add("a", [1, 2, 3], SamplingParams(max_tokens=50, temperature=1.5, seed=1, n=8))
        ended = Counter()
        while engine.holds("a"):
            ended.update(output.finish_reason for output in engine.step())
            assert engine.holds("a") == (ended["stop"] + ended["length"] < 8)
        assert ended["stop"] > 0
        engine.check_idle()


class TestAbort:
    @pytest.mark.parametrize("steps", range(8))
    def test_blocks_are_free_at_once_at_every_stage(self, steps):
        """While it waits, in its prompt, and in its answer; another goes on."""
        engine = make_engine(ContextBackend(), batch_tokens=20, sequences=2)
        engine.add("other", [4] * 5, SamplingParams(max_tokens=20, ignore_eos=True))
        engine.add("gone", [5] * 60, SamplingParams(max_tokens=20, n=3, ignore_eos=True))
        for _ in range(steps):
            engine.step()
        engine.abort("gone")
        assert engine.blocks.used == sum(len(s.table.blocks) for s in engine.scheduler.running) <= 2
        assert {output.request_id for _ in range(3) for output in engine.step()} == {"other"}
        collect(engine)

    def test_of_an_unknown_request_is_ignored_and_names_can_come_again(self):
        backend = ContextBackend()
        engine = make_engine(backend)
        engine.abort("never was")
        params = SamplingParams(max_tokens=9)
        for _ in range(2):
            engine.add("a", [1], params)
            engine.step()
            engine.abort("a")
            engine.abort("a")
        assert generate(engine, {"a": ([1], params)})["a", 0].answer == answer(backend, [1], params)

    def test_drafts_of_the_aborted_are_forgotten(self):
        engine = make_engine(ContextBackend(), speculator=Speculator(NgramDrafter(), adaptive=False))
        engine.add("a", [1, 2] * 10, SamplingParams(max_tokens=50, ignore_eos=True))
        for _ in range(6):
            engine.step()
        assert engine.stats().drafted_tokens > 0
        engine.abort("a")
        engine.check_idle()
        check_idle_speculator(engine)


class TestStops:
    """What ends an answer; `answer` tells it, and here are the cases by name."""

    def one(self, prompt: list[int], **fields: object) -> Received:
        backend = CheckedBackend()
        params = SamplingParams(**fields)
        found = generate(make_engine(backend), {"a": (prompt, params)})["a", 0]
        assert found.answer == answer(backend, prompt, params)
        return found

    def test_a_stop_text(self):
        found = self.one([1], stop=("567", "67"))
        assert (found.text, found.finish_reason, found.stop_reason) == ("234", "stop", "567")

    def test_a_stop_token(self):
        found = self.one([1], stop_token_ids=(5, 7))
        assert (found.text, found.tokens[-1], found.finish_reason, found.stop_reason) == ("234", 5, "stop", 5)

    def test_the_end_token(self):
        found = self.one([EOS - 3])
        assert (found.tokens, found.finish_reason, found.stop_reason) == ([EOS - 2, EOS - 1, EOS], "stop", None)

    def test_the_end_token_is_ignored_and_shown_if_asked(self):
        found = self.one([EOS - 1], ignore_eos=True, max_tokens=3, skip_special=False)
        assert (found.tokens, found.text, found.finish_reason) == ([EOS, 0, 1], "<end>01", "length")

    def test_nothing_ends_it_before_min_tokens(self):
        found = self.one([EOS - 3], min_tokens=3, max_tokens=4)
        assert EOS not in found.tokens[:3]
        assert self.one([1], stop=("3",), stop_token_ids=(5,), min_tokens=2, max_tokens=9).tokens == [2, 3, 4, 5]

    def test_the_context(self):
        backend = CheckedBackend(max_positions=20)
        found = generate(make_engine(backend), {"a": ([1] * 15, SamplingParams())})["a", 0]
        assert (len(found.tokens), found.finish_reason) == (5, "length")

    def test_a_stop_among_accepted_drafts_ends_it_there(self):
        backend = CheckedBackend()
        engine = make_engine(backend, speculator=Speculator(NgramDrafter(), adaptive=False))
        prompt = [*range(20), 0, 1]
        for fields in ({"stop": ("678",)}, {"stop_token_ids": (8,)}, {"max_tokens": 7}):
            params = SamplingParams(**fields)
            found = generate(engine, {"a": (prompt, params)})["a", 0]
            assert found.answer == answer(backend, prompt, params)
            assert max(len(output.tokens) for output in found.outputs) > 2


class TestLogprobs:
    @pytest.mark.parametrize("budget", [9, 64, 300])
    def test_of_prompt_and_answer_are_those_of_the_models_own_logits(self, budget):
        backend = ContextBackend()
        engine = make_engine(backend, batch_tokens=budget, sequences=8)
        prompt = (PREFIXES[0] * 4)[:150]
        params = SamplingParams(
            max_tokens=12, temperature=1.0, seed=3, logprobs=3, prompt_logprobs=2, logit_bias={2: 5.0}, ignore_eos=True
        )
        found = generate(engine, {"a": (prompt, params), "b": ([1], params), "c": ([1, 2], params)})
        for name, text in (("a", prompt), ("b", [1]), ("c", [1, 2])):
            check_answers(backend, text, params, [found[name, 0]])

    @pytest.mark.parametrize("length", [64, 65, 66, 129])
    def test_of_a_prompt_whose_answer_is_drafted_from_its_last_token(self, length):
        """A prompt is read in pieces of 64 tokens: the last one stands alone, like a token of an answer."""
        backend = ContextBackend()
        engine = make_engine(backend, batch_tokens=100, speculator=Speculator(NgramDrafter(), adaptive=False))
        prompt = ([1, 2, 3] * 50)[:length]
        params = SamplingParams(max_tokens=20, prompt_logprobs=1, logprobs=0, ignore_eos=True)
        check_answers(backend, prompt, params, [generate(engine, {"a": (prompt, params)})["a", 0]])
        assert engine.stats().drafted_tokens > 0

    def test_of_a_prompt_that_was_preempted_on_the_way(self):
        backend = ContextBackend()
        engine = make_engine(backend, blocks=14, batch_tokens=20, sequences=4)
        engine.add("old", [1] * 10, SamplingParams(max_tokens=200, ignore_eos=True))
        engine.step()
        prompt, params = (PREFIXES[0] * 3)[:150], SamplingParams(max_tokens=30, prompt_logprobs=1, ignore_eos=True)
        engine.add("a", prompt, params)
        found = collect(engine)
        assert engine.stats().preemptions > 0
        check_answers(backend, prompt, params, [found["a", 0]])


class Broken(CheckedBackend):
    """Counts; after a bad token nothing is a number."""

    BAD = 50

    def forward(self, batch):
        logits = super().forward(batch)
        logits[batch.tokens[batch.logit_rows] == self.BAD] = math.nan
        return logits


class Unlucky(Exception):
    """What a backend raises now and then."""


class TestFailures:
    @pytest.mark.parametrize("fields", [{}, {"temperature": 0.2, "seed": 1}, {"logprobs": 1}, {"min_tokens": 30}])
    @pytest.mark.parametrize("drafts", [False, True])
    def test_logits_that_are_not_finite_end_only_their_own_request(self, fields, drafts):
        backend = Broken()
        speculator = Speculator(NgramDrafter(), adaptive=False) if drafts else None
        engine = make_engine(backend, speculator=speculator)
        params = SamplingParams(max_tokens=30, **fields)
        good = {"good": ([60, 61, 60], params)}
        bad = {"bad": ([45, 46, 44, 45], SamplingParams(max_tokens=30)), "worse": ([50], SamplingParams(max_tokens=30))}
        found = generate(engine, good | bad)
        assert found["good", 0].answer == answer(backend, [60, 61, 60], params)
        assert found["bad", 0].tokens == [46, 47, 48, 49, 50]
        assert found["worse", 0].tokens == []
        for name in ("bad", "worse"):
            assert found[name, 0].finish_reason == "abort"
            assert found[name, 0].outputs[-1].error == NOT_FINITE
        check_idle_speculator(engine)

    def test_a_prompt_whose_logprobs_are_not_finite_ends_too(self):
        engine = make_engine(Broken())
        found = generate(engine, {"a": ([1, 50, 2, 3], SamplingParams(max_tokens=3, prompt_logprobs=1))})["a", 0]
        assert (found.finish_reason, found.tokens) == ("abort", [])
        assert found.outputs[-1].error == NOT_FINITE

    def test_a_step_that_fails_can_be_tried_again(self):
        backend = ContextBackend()
        engine = make_engine(backend, batch_tokens=20, speculator=Speculator(NgramDrafter(), adaptive=False))
        rng = np.random.default_rng(1)
        requests = {f"r{i}": (random_prompt(rng), random_params(rng)) for i in range(8)}
        for name, (prompt, params) in requests.items():
            engine.add(name, prompt, params)
        forward, received = backend.forward, {}

        def sometimes(batch):
            logits = forward(batch)
            if rng.random() < 0.3:
                raise Unlucky
            return logits

        backend.forward = sometimes
        while engine.has_work:
            outputs = []
            with contextlib.suppress(Unlucky):
                outputs = engine.step()
            for output in outputs:
                received.setdefault((output.request_id, output.choice), Received()).take(output)
        engine.check_idle()
        for name, (prompt, params) in requests.items():
            check_answers(backend, prompt, params, [received.get((name, i)) for i in range(params.n)])


class TestRefusals:
    """What is wrong is said at once, and leaves nothing behind."""

    @pytest.mark.parametrize(
        ("prompt", "params", "message"),
        [
            ([], {}, "the prompt is empty"),
            ([1] * 1024, {}, "1,024 tokens do not fit a context of 1,024"),
            ([1] * 2000, {}, "2,000 tokens do not fit a context of 1,024"),
            ([1] * 150, {"max_tokens": 11}, "150 tokens and an answer of up to 11 do not fit the KV cache of 160"),
            ([VOCAB], {}, f"token {VOCAB} is not one of 0 to {VOCAB - 1}"),
            ([1, -1], {}, "token -1"),
            (["1"], {}, "token '1'"),
            ([True], {}, "token True"),
            ([1], {"logit_bias": {VOCAB: 1.0}}, f"token {VOCAB}"),
            ([1], {"stop_token_ids": (VOCAB,)}, f"token {VOCAB}"),
        ],
    )
    def test_a_request_that_cannot_be_served(self, prompt, params, message):
        engine = make_engine(CheckedBackend(), blocks=10)
        before = engine.stats()
        with pytest.raises(EngineError, match=message):
            engine.add("a", prompt, SamplingParams(**params))
        assert not engine.has_work
        assert engine.stats() == before
        engine.check_idle()
        assert engine.step() == []

    def test_a_name_that_is_in_use(self):
        engine = make_engine(CheckedBackend())
        engine.add("a", [1], SamplingParams(max_tokens=3))
        with pytest.raises(EngineError, match="there is a request 'a' already"):
            engine.add("a", [2], SamplingParams())
        assert collect(engine)["a", 0].tokens == [2, 3, 4]

    def test_the_longest_prompt_has_room_for_one_token(self):
        for blocks, positions, most in ((10, 1024, 159), (200, 100, 99)):
            engine = make_engine(CheckedBackend(positions), blocks=blocks)
            assert engine.max_prompt_tokens == most
            found = generate(engine, {"a": ([1] * most, SamplingParams(max_tokens=1))})
            assert found["a", 0].tokens == [2]
            with pytest.raises(EngineError, match="do not fit"):
                engine.add("b", [1] * (most + 1), SamplingParams(max_tokens=1))

    @pytest.mark.parametrize("fields", [{"max_batch_tokens": 0}, {"max_sequences": True}, {"kv_memory": 1.5}])
    def test_options_that_make_no_sense(self, fields):
        with pytest.raises(EngineError, match=next(iter(fields))):
            EngineOptions(**fields)

    def test_a_cache_of_less_than_a_block(self):
        with pytest.raises(EngineError, match="hold not one block of 16 tokens"):
            make_engine(CheckedBackend(), blocks=0.5)

    def test_a_backend_that_has_no_room(self, monkeypatch):
        engine = make_engine(CheckedBackend())
        monkeypatch.setattr(engine.backend, "reserve", lambda blocks: (_ for _ in ()).throw(EngineError("no room")))
        with pytest.raises(EngineError, match="no room"):
            engine.add("a", [1], SamplingParams())
        assert not engine.has_work
        engine.check_idle()


class TestTheCacheBetweenRequests:
    def test_is_forgotten_when_others_have_used_it(self):
        backend = CheckedBackend()
        engine = make_engine(backend)
        params = SamplingParams(max_tokens=2)
        generate(engine, {"a": ([1] * 40, params)})
        backend._pages[:] = 7
        backend.cache_epoch += 1
        found = generate(engine, {"a": ([1] * 40, params)})["a", 0]
        assert (found.tokens, found.outputs[0].cached_tokens) == ([2, 3], 0)

    def test_is_not_forgotten_while_it_is_in_use(self):
        engine = make_engine(CheckedBackend())
        engine.add("a", [1] * 40, SamplingParams(max_tokens=2))
        with pytest.raises(EngineError, match="in use"):
            engine.forget()
        collect(engine)
        engine.forget()
        found = generate(engine, {"a": ([1] * 40, SamplingParams(max_tokens=2))})["a", 0]
        assert found.outputs[0].cached_tokens == 0

    def test_keeps_answers_too(self):
        engine = make_engine(CheckedBackend())
        params = SamplingParams(max_tokens=40)
        first = generate(engine, {"a": ([1] * 10, params)})["a", 0]
        found = generate(engine, {"b": ([1] * 10 + first.tokens + [9], params)})["b", 0]
        assert found.outputs[0].cached_tokens == 48

    def test_leaked_blocks_are_told(self):
        engine = make_engine(CheckedBackend())
        engine.add("a", [1] * 40, SamplingParams())
        engine.step()
        table = engine.scheduler.running[0].table
        engine.scheduler.running[0].table = type(table)()
        engine.abort("a")
        with pytest.raises(EngineError, match="3 blocks of the KV cache are held by nobody"):
            engine.check_idle()

    def test_a_backend_that_reads_a_wrong_block_is_found_out(self):
        """The instrument of all these tests works."""
        engine = make_engine(CheckedBackend())
        engine.add("a", [1] * 40, SamplingParams(max_tokens=5))
        engine.step()
        blocks = engine.scheduler.running[0].table.blocks
        blocks[0], blocks[1] = blocks[1], 5
        with pytest.raises((EngineError, AssertionError)):
            engine.step()


def test_stats_count_what_there_is():
    engine = make_engine(CheckedBackend(), blocks=30, sequences=2)
    for name in "abc":
        engine.add(name, [1, 2, 3], SamplingParams(max_tokens=3))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks, stats.kv_blocks_used) == (2, 1, 30, 2)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (9, 2, 1)
    collect(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.generated_tokens) == (0, 0, 0, 9)
    assert stats.step_seconds > 0


class TestSpeculation:
    def test_fewer_steps_give_the_same_tokens(self):
        steps = {}
        for drafts in (False, True):
            backend = CheckedBackend()
            speculator = Speculator(NgramDrafter(), adaptive=False) if drafts else None
            engine = make_engine(backend, speculator=speculator)
            prompt = [*range(90), *range(10)]
            found = generate(engine, {"a": (prompt, SamplingParams(max_tokens=60, ignore_eos=True))})["a", 0]
            assert found.tokens == list(range(10, 70))
            steps[drafts] = engine.stats().steps
        assert steps[True] * 5 < steps[False]

    def test_what_is_sampled_has_the_distribution_of_the_model(self):
        """Chi-square of token after token, over 6,000 of them, many of which were drafted."""
        backend = ContextBackend(spread=0.0, seed=2)
        backend.table[:, 5:] = -40.0  # five letters, and hardly a likeliest one
        backend.table[:, :5] /= 4
        drafter = TableDrafter(backend.table, seed=1, wrong=0.5)
        engine = make_engine(
            backend, blocks=400, batch_tokens=256, sequences=60, speculator=Speculator(drafter, adaptive=False)
        )
        params = SamplingParams(max_tokens=100, temperature=0.8, n=60, seed=9)
        found = generate(engine, {"a": ([1], params)})
        counts = np.zeros((5, 5))
        for received in found.values():
            for before, token in zip([1, *received.tokens], received.tokens, strict=False):
                counts[before, token] += 1
        assert counts.sum() == 6000
        probabilities = torch.from_numpy(backend.table[:5, :5] / 0.8).softmax(-1).numpy()
        expected = counts.sum(1, keepdims=True) * probabilities
        assert expected.min() > 5
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < 45.3  # 20 degrees of freedom: one in a thousand is above
        stats = engine.stats()
        assert stats.accepted_tokens > 1000
        assert stats.drafted_tokens - stats.accepted_tokens > 1000


class Digits:
    """A grammar of digits; `broken`: the verb that fails after four of them."""

    finished = False

    def __init__(self, broken: str = "", seen: int = 0) -> None:
        self.broken, self.seen = broken, seen

    def mask(self, logits):
        self._try("mask")
        logits[10:] = -math.inf

    def accept(self, token):
        self._try("accept")
        assert token < 10
        self.seen += 1

    def copy(self):
        return Digits(self.broken, self.seen)

    def allowed(self, tokens):
        self._try("allowed")
        return next((i for i, token in enumerate(tokens) if token >= 10), len(tokens))

    def _try(self, verb: str) -> None:
        if verb == self.broken and self.seen >= 4:
            raise EngineError("too complex to follow")


class TestGrammars:
    PARAMS = SamplingParams(max_tokens=12, grammar=Grammar("regex", "[0-9]*"), n=2, ignore_eos=True)
    ANSWER = (5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6)

    @pytest.mark.parametrize("drafts", [False, True])
    def test_each_choice_has_a_state_of_its_own(self, monkeypatch, drafts):
        speculator = Speculator(NgramDrafter(), adaptive=False) if drafts else None
        engine = make_engine(CheckedBackend(), speculator=speculator)
        asked = []
        monkeypatch.setattr(engine, "_matcher", lambda params: asked.append(Digits()) or asked[-1])
        found = generate(engine, {"a": ([3, 4, 5, 6, 7, 11, 12, 3, 4], self.PARAMS)})
        assert [matcher.seen for matcher in asked] == [12, 12]
        for choice in range(2):
            assert tuple(found["a", choice].tokens) == self.ANSWER
        assert not drafts or engine.stats().accepted_tokens > 0

    @pytest.mark.parametrize("broken", ["mask", "accept", "allowed"])
    @pytest.mark.parametrize("drafts", [False, True])
    def test_one_that_cannot_be_followed_ends_only_its_own_request(self, monkeypatch, broken, drafts):
        speculator = Speculator(NgramDrafter(), adaptive=False) if drafts else None
        engine = make_engine(CheckedBackend(), speculator=speculator)
        monkeypatch.setattr(engine, "_matcher", lambda p: None if p.grammar is None else Digits(broken))
        prompt = [3, 4, 5, 6, 7, 8, 9, 0, 1, 11, 12, 3, 4]
        plain = SamplingParams(max_tokens=30, ignore_eos=True)
        found = generate(engine, {"a": (prompt, self.PARAMS), "b": (prompt, plain)})
        assert found["b", 0].tokens == list(range(5, 35))
        for choice in range(2):
            tokens = tuple(found["a", choice].tokens)
            if broken == "allowed":  # only drafts ask
                assert tokens == self.ANSWER
                continue
            assert tokens == self.ANSWER[: len(tokens)]
            assert len(tokens) == 4
            assert found["a", choice].finish_reason == "abort"
            assert found["a", choice].outputs[-1].error == "too complex to follow"
        check_idle_speculator(engine)
