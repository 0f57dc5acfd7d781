"""Replicas behind one router, event by event: requests come, are routed, delivered, computed and answered.

A discrete-event simulation: nothing happens between events, and of events at one moment the end of a step comes first.
The same trace gives the same answers.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..engine.block_manager import chain
from ..engine.sequence import Sequence
from ..errors import UsageError
from ..measure.load.stats import Answer, summarize
from .cost import StepCost
from .replica import Replica, ReplicaOptions, make_sequence
from .routing import Routing, make_router
from .trace import Request

Progress: TypeAlias = Callable[[str, int, int], None]

STEP_ENDS, DELIVERED, ROUTED, SENT = range(4)
"""Kinds of events, in the order in which those of one moment happen."""
PROGRESS_EVERY = 500
"""Requests."""


@dataclass(frozen=True)
class FleetOptions:
    """How replicas are put together. Raises UsageError."""

    replicas: int = 1
    routing: Routing = "least-loaded"
    router_s: float = 0.0
    """Seconds that the router takes for a request, one after the other."""
    replica: ReplicaOptions = field(default_factory=ReplicaOptions)

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise UsageError(f"{self.replicas} replicas: there is one at least")
        if not 0 <= self.router_s < float("inf"):
            raise UsageError(f"a router that takes {self.router_s} s for a request", hint="0 or more")


@dataclass
class Outcome:
    """What a simulation has given."""

    answers: list[Answer]
    """In the order of the trace."""
    duration: float
    """Seconds from the first request to the end of the last."""
    busy: list[float]
    """Seconds that each replica computed."""
    routed: list[int]
    """Requests that each replica got."""
    steps: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    router_busy: float

    def summary(self, bounds: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Rates, latencies and how busy everything was, by the names of a record of `gossamer bench serve`."""
        mean = sum(self.busy) / len(self.busy)
        return {
            **summarize(self.answers, self.duration, bounds),
            "utilisation": round(mean / self.duration, 4),
            "busiest_over_mean": round(max(self.busy) / mean, 4),
            "router_utilisation": round(self.router_busy / self.duration, 4),
            "prefix_hit_rate": round(self.prefix_hits / self.prefix_queries, 4),
            "steps": self.steps,
            "preemptions": self.preemptions,
        }


@dataclass
class _Flight:
    """One request on its way."""

    sent: float
    replica: int = 0
    arrivals: list[float] = field(default_factory=list)
    """When each token came, since it was sent."""


def simulate(
    requests: Many[Request],
    cost: StepCost,
    options: FleetOptions = FleetOptions(),
    concurrency: int = 8,
    progress: Progress = lambda label, done, total: None,
) -> Outcome:
    """Run a trace to its end. Requests without an arrival are sent by `concurrency` clients, one after the other each.

    Raises UsageError for a trace of nothing, EngineError for a request that no replica can hold.
    """
    if not requests:
        raise UsageError("a trace without a request")
    if concurrency < 1:
        raise UsageError(f"{concurrency} clients: there is one at least")
    return _Simulation(requests, cost, options, concurrency, progress).run()


class _Simulation:
    def __init__(
        self, requests: Many[Request], cost: StepCost, options: FleetOptions, concurrency: int, progress: Progress
    ) -> None:
        self._requests, self._cost, self._options, self._progress = requests, cost, options, progress
        self._replicas = [Replica(options.replica, cost) for _ in range(options.replicas)]
        self._router = make_router(options.routing)
        self._router_free = self._router_busy = 0.0
        self._loads = [0] * options.replicas
        self._routed = [0] * options.replicas
        self._events: list[tuple[float, int, int]] = []
        """Moment, kind, and the number of a request or, of a step, of a replica."""
        self._flights: dict[int, _Flight] = {}
        self._coming: dict[int, Sequence] = {}
        """Between the router and the replica."""
        self._numbers: dict[Sequence, int] = {}
        self._answers: dict[int, Answer] = {}
        waiting = (number for number, request in enumerate(requests) if request.arrival is None)
        self._queue = deque(waiting)
        for number, request in enumerate(requests):
            if request.arrival is not None:
                self._happens(request.arrival, SENT, number)
        for _ in range(min(concurrency, len(self._queue))):
            self._happens(0.0, SENT, self._queue.popleft())

    def run(self) -> Outcome:
        handle = {STEP_ENDS: self._step_ends, DELIVERED: self._deliver, ROUTED: self._route, SENT: self._send}
        first, now = self._events[0][0], 0.0
        while self._events:
            now, kind, number = heapq.heappop(self._events)
            handle[kind](now, number)
        schedulers = [replica.scheduler for replica in self._replicas]
        return Outcome(
            answers=[self._answers[number] for number in range(len(self._requests))],
            duration=now - first,
            busy=[replica.busy for replica in self._replicas],
            routed=self._routed,
            steps=sum(replica.steps for replica in self._replicas),
            preemptions=sum(s.preemptions for s in schedulers),
            prefix_queries=sum(s.prefix_queries for s in schedulers),
            prefix_hits=sum(s.prefix_hits for s in schedulers),
            router_busy=self._router_busy,
        )

    def _happens(self, moment: float, kind: int, number: int) -> None:
        heapq.heappush(self._events, (moment, kind, number))

    def _send(self, now: float, number: int) -> None:
        """A client sends; the router turns to it when it has dealt with all before."""
        self._flights[number] = _Flight(now)
        self._router_free = max(now, self._router_free) + self._options.router_s
        self._router_busy += self._options.router_s
        self._happens(self._router_free, ROUTED, number)

    def _route(self, now: float, number: int) -> None:
        request = self._requests[number]
        prompt = request.prompt(number)
        digests = chain(prompt)
        chosen = self._router.choose(digests, self._loads)
        self._loads[chosen] += 1
        self._routed[chosen] += 1
        self._flights[number].replica = chosen
        self._coming[number] = make_sequence(prompt, request.output_tokens, digests)
        self._happens(now + self._cost.request_s, DELIVERED, number)

    def _deliver(self, now: float, number: int) -> None:
        sequence = self._coming.pop(number)
        self._numbers[sequence] = number
        chosen = self._flights[number].replica
        self._replicas[chosen].add(sequence)
        if not self._replicas[chosen].stepping:
            self._begin(now, chosen)

    def _begin(self, now: float, chosen: int) -> None:
        seconds = self._replicas[chosen].begin()
        if seconds > 0:
            self._happens(now + seconds, STEP_ENDS, chosen)

    def _step_ends(self, now: float, chosen: int) -> None:
        for sequence in self._replicas[chosen].end():
            number = self._numbers[sequence]
            flight = self._flights[number]
            flight.arrivals.append(now - flight.sent)
            if sequence.finish_reason is not None:
                del self._numbers[sequence]
                self._finish(now, number, sequence)
        self._begin(now, chosen)

    def _finish(self, now: float, number: int, sequence: Sequence) -> None:
        flight = self._flights.pop(number)
        self._loads[flight.replica] -= 1
        self._answers[number] = Answer(
            arrivals=tuple(flight.arrivals),
            e2e=flight.arrivals[-1],
            output_tokens=sequence.generated,
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached_tokens,
        )
        if self._queue:
            self._happens(now, SENT, self._queue.popleft())
        if len(self._answers) % PROGRESS_EVERY == 0 or len(self._answers) == len(self._requests):
            self._progress("simulating", len(self._answers), len(self._requests))
