"""The steps of a real engine: how long each took and what was in it, for `cost.fit`. Needs torch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from ..engine.engine import Engine
from ..engine.params import SamplingParams
from ..engine.scheduler import Piece, Scheduler
from ..engine.sequence import Output
from ..measure.records import machine_block
from .cost import StepCost, StepWork, fit, work_of

Progress: TypeAlias = Callable[[str, int, int], None]

LEVELS = (1, 2, 4, 8, 16, 32)
"""Requests under way at a time."""
REQUESTS = 1.5
"""For each of them."""
PROMPTS, ANSWERS = (16, 512), (8, 48)
"""Tokens, the fewest and the most."""


class _Noting(Scheduler):
    """Remembers what is in the step that it made last."""

    work = StepWork()

    def schedule(self) -> list[Piece]:
        pieces = super().schedule()
        self.work = work_of(pieces)
        return pieces


class TimedEngine(Engine):
    """An engine that says after each step what was in it and how long it took.

    A step that follows on another begins where that one ended: what lies between them is a part of it.
    """

    def __init__(
        self, engine: Engine, note: Callable[[StepWork, float], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(engine.backend, engine.tokenizer, engine.options)
        self._noting = _Noting(self.blocks, engine.options.max_batch_tokens, engine.options.max_sequences)
        self.scheduler = self._noting
        self._note, self._clock = note, clock
        self._ended: float | None = None
        """When the step before ended, if there was more to do."""

    def step(self) -> list[Output]:
        began = self._clock() if self._ended is None else self._ended
        outputs = super().step()
        ended = self._clock()
        self._note(self._noting.work, ended - began)
        self._ended = ended if self.has_work else None
        return outputs


def measure_cost(model: str, progress: Progress, seed: int = 0, **choice: Any) -> StepCost:
    """What steps of this model cost on this machine; `choice`: as `build_engine` takes it.

    Raises CheckpointError, DoesNotFit, EngineError.
    """
    from ..engine.build import build_engine

    engine = build_engine(model, **choice)
    backend = engine.backend
    steps = timed_steps(engine, progress, seed)
    described = f"{backend.name} ({backend.describe()}), KV cache {backend.kv_dtype}"
    return fit(steps, {"model": model, "backend": described, "machine": machine_block()})


def timed_steps(
    engine: Engine, progress: Progress, seed: int = 0, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[StepWork, float]]:
    """Steps of random requests, few and many at a time, after some that do not count."""
    steps: list[tuple[StepWork, float]] = []
    timed = TimedEngine(engine, lambda work, seconds: steps.append((work, seconds)), clock)
    dice = random.Random(seed)
    _load(timed, dice, 2, 2)
    steps.clear()
    for done, level in enumerate(LEVELS):
        progress("measuring steps", done, len(LEVELS))
        _load(timed, dice, level, max(3, round(REQUESTS * level)))
    progress("measuring steps", len(LEVELS), len(LEVELS))
    return steps


def _load(engine: Engine, dice: random.Random, level: int, requests: int) -> None:
    """So many requests, `level` of them at a time."""
    config = engine.backend.config
    most = min(PROMPTS[1], config.max_positions // 2)
    sent = under_way = 0
    while sent < requests or under_way:
        while sent < requests and under_way < level:
            prompt = [dice.randrange(config.vocab_size) for _ in range(dice.randint(min(PROMPTS[0], most), most))]
            params = SamplingParams(dice.randint(*ANSWERS), ignore_eos=True)
            engine.add(f"{sent}", prompt, params)
            sent, under_way = sent + 1, under_way + 1
        under_way -= sum(output.finish_reason is not None for output in engine.step())
