"""The engine over real kernels: greedy tokens are those of the model alone, however a step is put together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_doubles import AnswerDrafter
from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.engine import LLM
from gossamer.engine.backend import BLOCK_SIZE, Backend, choose
from gossamer.engine.engine import Engine, EngineOptions
from gossamer.engine.params import SamplingParams
from gossamer.engine.reference import ReferenceBackend
from gossamer.engine.speculative import Speculator

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
TIE = 1e-4
"""Logits so near to each other that the order of sums may decide; the spread of all logits is about 1.5."""


def prompts() -> list[list[int]]:
    """Of all lengths, two of them with a beginning of three blocks that others have."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 250, 3 * BLOCK_SIZE).tolist()
    own = [rng.integers(3, 250, size).tolist() for size in (1, 5, 16, 17, 33)]
    return [*own, [*shared, 7], [*shared, 9, 9, 9], [20, 21, 22] * 8]


def tokens(engine: Engine, requests: list[list[int]], params: SamplingParams = PARAMS) -> list[list[int]]:
    """Answers to requests that come together."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(requests):
        engine.add(str(i), prompt, params)
        found[str(i)] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found[output.request_id] += [token.id for token in output.tokens]
    engine.check_idle()
    return list(found.values())


def make_engine(
    backend: Backend, checkpoint: Checkpoint, blocks: int = 100, budget: int = 512, drafts: AnswerDrafter | None = None
) -> Engine:
    """An engine that guesses in every step, if it is given a drafter."""
    options = EngineOptions(int(blocks * BLOCK_SIZE * backend.kv_bytes_per_token), budget, max_sequences=8)
    speculator = Speculator(drafts, adaptive=False) if drafts else None
    return Engine(backend, checkpoint.tokenizer(), options, speculator)


@pytest.fixture(params=["dense", "packed"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(request.getfixturevalue({"dense": "tiny_model", "packed": "tiny_packed"}[request.param]))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Backend:
    return choose(checkpoint, request.param, activations="exact", kv_cache="fp32")


@pytest.fixture
def check(checkpoint: Checkpoint):
    """Answers follow the likeliest token of the reference model, read without a cache, at every place."""
    reference = ReferenceBackend.load(checkpoint, "stored")

    def check(requests: list[list[int]], answers: list[list[int]]) -> None:
        assert [len(a) for a in answers] == [PARAMS.max_tokens] * len(requests)
        for prompt, answer in zip(requests, answers, strict=True):
            logits = reference.decoder(torch.tensor([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            assert bool((chosen >= logits.amax(1) - TIE).all())

    return check


def test_alone_and_together(backend, checkpoint, check):
    together = tokens(make_engine(backend, checkpoint), prompts())
    check(prompts(), together)
    alone = [tokens(make_engine(backend, checkpoint), [prompt])[0] for prompt in prompts()]
    assert alone == together


@pytest.mark.parametrize("budget", [8, 16, 31])
def test_in_chunks(backend, checkpoint, check, budget):
    check(prompts(), tokens(make_engine(backend, checkpoint, budget=budget), prompts()))


def test_with_beginnings_in_the_cache(backend, checkpoint, check):
    engine = make_engine(backend, checkpoint)
    for hits in (3, 10):  # the second time all of what was read the first time, in whole blocks
        before = engine.stats().prefix_hits
        check(prompts(), tokens(engine, prompts()))
        assert engine.stats().prefix_hits - before == hits * BLOCK_SIZE


def test_after_preemption(backend, checkpoint, check):
    engine = make_engine(backend, checkpoint, blocks=12)
    check(prompts(), tokens(engine, prompts()))
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("blocks", [100, 12])
def test_with_speculation(backend, checkpoint, check, blocks):
    plain = tokens(make_engine(backend, checkpoint), prompts())
    drafter = AnswerDrafter(zip(prompts(), plain, strict=True), backend.config.vocab_size)
    engine = make_engine(backend, checkpoint, blocks, drafts=drafter)
    check(prompts(), tokens(engine, prompts()))
    assert engine.stats().accepted_tokens > 50
    assert engine.stats().drafted_tokens > engine.stats().accepted_tokens


def test_a_seed_gives_the_same_tokens_with_speculation(backend, checkpoint):
    params = SamplingParams(max_tokens=24, temperature=0.6, top_p=0.95, seed=5, ignore_eos=True)
    plain = tokens(make_engine(backend, checkpoint), prompts(), params)
    drafter = AnswerDrafter(zip(prompts(), plain, strict=True), backend.config.vocab_size)
    engine = make_engine(backend, checkpoint, drafts=drafter)
    assert tokens(engine, prompts(), params) == plain
    assert engine.stats().accepted_tokens > 50


def test_a_request_together_with_others_is_the_same_when_it_is_sampled(backend, checkpoint):
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
    engine = make_engine(backend, checkpoint, blocks=14, budget=20)
    together = tokens(engine, prompts(), params)
    assert [tokens(engine, [prompt], params)[0] for prompt in prompts()] == together


def test_a_large_batch_has_steps_that_are_large_enough(tiny_model):
    llm = LLM(tiny_model, max_batch=600)
    assert len(llm.generate([[5]], PARAMS)[0].tokens) == PARAMS.max_tokens
    assert (llm.engine.options.max_sequences, llm.engine.options.max_batch_tokens) == (600, 600)
