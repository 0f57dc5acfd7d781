"""A replica makes the steps that the engine makes, and takes the time that the cost says."""

from __future__ import annotations

import random

import pytest

from engine_doubles import LETTERS, CheckedBackend, make_engine
from gossamer.engine.backend import BLOCK_SIZE
from gossamer.engine.block_manager import chain
from gossamer.engine.params import SamplingParams
from gossamer.errors import EngineError, UsageError
from gossamer.simulate.cost import StepCost, StepWork, work_of
from gossamer.simulate.measure import TimedEngine
from gossamer.simulate.replica import Replica, ReplicaOptions, make_sequence

COST = StepCost(step_s=1.0, prompt_token_s=0.01, decode_token_s=0.1, context_token_s=0.001)


@pytest.mark.parametrize("blocks", [300, 24], ids=["room", "preemptions"])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_replica_makes_the_steps_of_the_engine(seed: int, reuse: bool, blocks: int) -> None:
    """Both get the same requests between the same steps, many of which begin alike."""
    dice = random.Random(seed)
    options = ReplicaOptions(blocks * BLOCK_SIZE, max_batch_tokens=48, max_sequences=6, prefix_reuse=reuse)
    works: list[StepWork] = []
    real = make_engine(CheckedBackend(), blocks, batch_tokens=48, sequences=6, reuse=reuse)
    engine = TimedEngine(real, lambda work, seconds: works.append(work))
    engine.backend.engine = engine  # type: ignore[attr-defined]  # whose sequences the double looks at
    replica = Replica(options, COST)
    shared = [[dice.randrange(LETTERS) for _ in range(64)] for _ in range(2)]
    to_send = [
        ([*dice.choice(shared)[: dice.randrange(64)], *(dice.randrange(LETTERS) for _ in range(dice.randint(1, 80)))],
         dice.randint(1, 40))
        for _ in range(30)
    ]  # fmt: skip
    names, sent, steps = {}, 0, 0
    while sent < len(to_send) or engine.has_work:
        for prompt, output in to_send[sent : sent + dice.randint(0, 3)]:
            engine.add(f"{sent}", prompt, SamplingParams(output, ignore_eos=True))
            sequence = make_sequence(list(prompt), output, chain(prompt))
            replica.add(sequence)
            names[sequence] = f"{sent}"
            sent += 1
        if not engine.has_work:
            continue
        outputs = engine.step()
        seconds = replica.begin()
        assert seconds == pytest.approx(COST.seconds(works[-1]))
        told = replica.end()
        assert [names[s] for s in told] == [output.request_id for output in outputs]
        assert [s.cached_tokens or 0 for s in told] == [output.cached_tokens for output in outputs]
        steps += 1
    stats = engine.stats()
    scheduler = replica.scheduler
    assert (scheduler.preemptions, scheduler.prefix_hits) == (stats.preemptions, stats.prefix_hits)
    assert (stats.preemptions > 0) == (blocks == 24)
    assert (stats.prefix_hits > 0) == reuse
    assert replica.steps == steps == stats.steps
    assert replica.blocks.used == 0
    assert replica.begin() == 0.0


def test_work_tells_prompts_from_answers() -> None:
    replica = Replica(ReplicaOptions(max_batch_tokens=64, max_sequences=4), COST)
    replica.add(make_sequence(list(range(100)), 3, []))
    seen = []
    for _ in range(4):
        pieces = replica.scheduler.schedule()
        seen.append(work_of(pieces))
        replica._pieces = pieces
        replica.end()
    assert seen == [StepWork(64, 0, 64), StepWork(36, 0, 100), StepWork(0, 1, 101), StepWork(0, 1, 102)]


def test_a_prompt_of_one_token_is_decoded() -> None:
    replica = Replica(ReplicaOptions(), COST)
    replica.add(make_sequence([5], 1, []))
    assert work_of(replica.scheduler.schedule()) == StepWork(0, 1, 1)


def test_what_no_replica_can_hold_is_refused_as_the_engine_does() -> None:
    replica = Replica(ReplicaOptions(kv_tokens=64), COST)
    with pytest.raises(EngineError, match="do not fit the KV cache"):
        replica.add(make_sequence(list(range(60)), 20, []))
    with pytest.raises(EngineError, match="cannot serve"):
        Replica(ReplicaOptions(max_batch_tokens=4, max_sequences=8), COST)
    for name in ("kv_tokens", "max_batch_tokens", "max_sequences"):
        with pytest.raises(UsageError, match=name):
            ReplicaOptions(**{name: 0})
