"""All requests of a load: so many under way at a time, or each at its own random moment.

The answers are read between requests only when what has arrived takes much memory, and at the end.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .answer import read_answer
from .plan import LoadPlan, moments
from .prompts import Ask
from .stats import Answer
from .target import Target
from .wire import Exchange, exchange

Progress: TypeAlias = Callable[[str, int, int], None]

HELD_BYTES = 64 << 20
"""Of responses that nobody has read yet."""


@dataclass
class Load:
    """What a load has given."""

    answers: list[Answer] = field(default_factory=list)
    duration: float = 0.0
    """Seconds from the first request to the end of the last."""
    unfinished: int = 0
    """Requests that were under way when the load was interrupted, or had not been sent."""
    cpu: float = 0.0
    """Seconds that this process computed meanwhile."""


class Sender:
    """Sends one load to one server."""

    def __init__(self, target: Target, plan: LoadPlan, asks: Sequence[Ask], progress: Progress, label: str) -> None:
        self.plan, self.progress, self.label = plan, progress, label
        self.url, self.headers = target.url(plan.endpoint), target.headers
        bodies = (ask.body(plan.endpoint, target.model, plan, i) for i, ask in enumerate(asks))
        self.bodies = [json.dumps(body).encode() for body in bodies]
        self.load = Load()
        self._held: list[Exchange] = []
        self._held_bytes, self._done = 0, 0

    async def run(self) -> None:
        """Send everything. Cancelled, it ends what is under way; `load` has what was complete by then."""
        started, computed = time.perf_counter(), time.process_time()
        jobs = self._streams() if self.plan.rate is None else self._moments(self.plan.rate)
        tasks = [asyncio.create_task(job) for job in jobs]
        self.progress(self.label, 0, len(self.bodies))
        try:
            await asyncio.gather(*tasks)
        finally:
            self.load.duration = time.perf_counter() - started
            self.load.cpu = time.process_time() - computed
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._read()
            self.load.unfinished = len(self.bodies) - len(self.load.answers)

    def _streams(self) -> Iterator[Coroutine[Any, Any, None]]:
        """As many clients as the plan has, each with one request after the other, from one queue."""
        queue = iter(self.bodies)

        async def one_client() -> None:
            for body in queue:
                await self._send(body)

        return (one_client() for _ in range(min(self.plan.concurrency, len(self.bodies))))

    def _moments(self, rate: float) -> Iterator[Coroutine[Any, Any, None]]:
        """Requests that arrive as a Poisson process of this rate, the first at once: none waits for another."""

        async def one_request(moment: float, body: bytes) -> None:
            await asyncio.sleep(moment)
            await self._send(body)

        return (
            one_request(moment, body)
            for moment, body in zip(moments(rate, len(self.bodies), self.plan.seed), self.bodies, strict=True)
        )

    async def _send(self, body: bytes) -> None:
        got = await exchange(self.url, self.headers, body, self.plan.timeout)
        self._held.append(got)
        self._held_bytes += got.nbytes
        if self._held_bytes > HELD_BYTES:
            self._read()
        self._done += 1
        self.progress(self.label, self._done, len(self.bodies))

    def _read(self) -> None:
        self.load.answers += map(read_answer, self._held)
        self._held, self._held_bytes = [], 0
