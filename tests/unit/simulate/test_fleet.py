"""Whole simulations: nothing is lost, the clock is right, the same comes of the same, and routing does what it says."""

from __future__ import annotations

import asyncio
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import UnknownName, UsageError
from gossamer.measure.load import prompts
from gossamer.measure.load.plan import Length, LoadPlan, moments
from gossamer.simulate.cost import StepCost
from gossamer.simulate.fleet import FleetOptions, Outcome, _Simulation, simulate
from gossamer.simulate.replica import ReplicaOptions
from gossamer.simulate.routing import AHEAD, ROUTERS, LeastLoaded, PrefixAware, RoundRobin, make_router
from gossamer.simulate.trace import Request, draw

COST = StepCost(step_s=0.01, prompt_token_s=0.0005, decode_token_s=0.002, context_token_s=1e-6, request_s=0.003)
PER_TOKEN = StepCost(step_s=0.0, prompt_token_s=1.0, decode_token_s=1.0, context_token_s=0.0)
SMALL = ReplicaOptions(kv_tokens=2048, max_batch_tokens=64, max_sequences=8)


def load(rate: float | None = 20.0, requests: int = 120, **changes: object) -> LoadPlan:
    lengths = {"input_tokens": Length(60, 50), "output_tokens": Length(20, 15)}
    return LoadPlan(**{"requests": requests, "rate": rate, **lengths, **changes})  # type: ignore[arg-type]


requests_of_any_kind = st.builds(
    lambda arrival, prompt, output, prefix, share: Request(arrival, prompt, output, prefix, int(share * prompt)),
    st.one_of(st.none(), st.floats(0, 30)), st.integers(1, 300), st.integers(1, 60), st.integers(0, 3), st.floats(0, 1),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(requests_of_any_kind, min_size=1, max_size=40), st.integers(1, 5), st.sampled_from(sorted(ROUTERS)),
    st.booleans(), st.integers(1, 9), st.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_every_request_ends_once_with_all_its_tokens(trace, replicas, routing, reuse, clients, router_s):
    own = ReplicaOptions(kv_tokens=512, max_batch_tokens=32, max_sequences=8, prefix_reuse=reuse)
    simulation = _Simulation(
        trace, COST, FleetOptions(replicas, routing, router_s, own), clients, lambda label, done, total: None
    )
    outcome = simulation.run()
    assert [a.output_tokens for a in outcome.answers] == [r.output_tokens for r in trace]
    assert [len(a.arrivals) for a in outcome.answers] == [r.output_tokens for r in trace]
    assert [a.prompt_tokens for a in outcome.answers] == [r.input_tokens for r in trace]
    assert all(list(a.arrivals) == sorted(a.arrivals) and a.arrivals[0] > 0 for a in outcome.answers)
    assert sum(outcome.routed) == len(trace)
    assert all(0 <= busy <= outcome.duration + 1e-6 for busy in outcome.busy)
    assert all(replica.blocks.used == 0 and not replica.stepping for replica in simulation._replicas)
    assert simulation._loads == [0] * replicas
    summary = outcome.summary()
    assert summary["completed"] == len(trace)
    assert summary["output_tokens"]["total"] == sum(r.output_tokens for r in trace)


@pytest.mark.parametrize("routing", sorted(ROUTERS))
def test_time_is_spent_on_every_token_once_where_there_is_room(routing: str) -> None:
    """A second a token: all but the last of each answer is fed, less what is in the cache already."""
    trace = draw(load(shared_prefix=40, seed=4))
    options = FleetOptions(3, routing, replica=ReplicaOptions(max_batch_tokens=64, max_sequences=64))
    outcome = simulate(trace, PER_TOKEN, options)
    fed = sum(r.input_tokens + r.output_tokens - 1 for r in trace)
    cached = sum(a.cached_tokens or 0 for a in outcome.answers)
    assert outcome.preemptions == 0
    assert cached == outcome.prefix_hits > 0
    assert sum(outcome.busy) == pytest.approx(fed - cached)


def test_one_request_takes_what_the_formula_says() -> None:
    """Chunks of 64 of a prompt of 150 tokens, then one token a step over a context that grows."""
    outcome = simulate([Request(2.0, 150, 5)], COST, FleetOptions(1, replica=SMALL))
    chunks = [(64, 64), (64, 128), (22, 150)]
    first = COST.request_s + sum(0.01 + 0.0005 * n + 1e-6 * context for n, context in chunks)
    steps = [0.01 + 0.002 + 1e-6 * context for context in (151, 152, 153, 154)]
    (answer,) = outcome.answers
    assert answer.ttft == pytest.approx(first)
    assert answer.gaps == pytest.approx(steps)
    assert outcome.duration == pytest.approx(first + sum(steps))
    assert outcome.busy == [pytest.approx(first + sum(steps) - COST.request_s)]


def test_one_client_sends_when_its_answer_is_there() -> None:
    outcome = simulate(draw(load(None, 12)), COST, FleetOptions(1, replica=SMALL), concurrency=1)
    assert outcome.duration == pytest.approx(sum(answer.e2e for answer in outcome.answers))


def test_a_router_that_takes_long_is_what_all_wait_for() -> None:
    trace = draw(load(rate=1000.0, requests=50))
    outcome = simulate(trace, COST, FleetOptions(20, "least-loaded", router_s=1.0))
    assert outcome.summary()["router_utilisation"] > 0.9
    assert [a.ttft for a in outcome.answers] == sorted(a.ttft for a in outcome.answers)
    assert 50.0 < outcome.duration < 53.0


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    summaries = [
        simulate(draw(load(seed=seed), prefixes=3), COST, FleetOptions(3, "prefix", replica=SMALL)).summary()
        for seed in (7, 7, 8)
    ]
    assert summaries[0] == summaries[1] != summaries[2]


def test_a_trace_asks_what_bench_serve_asks() -> None:
    plan = load(requests=40, shared_prefix=10, seed=3)
    asks = asyncio.run(prompts.synthetic(plan, prompts.Ruler()))  # a token for each word
    trace = draw(plan)
    assert [r.output_tokens for r in trace] == [ask.max_tokens for ask in asks]
    assert [r.input_tokens for r in trace] == [10 + len(ask.prompt.split()) for ask in asks]
    assert [r.arrival for r in trace] == moments(plan.rate, 40, 3)


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    a, b, c = (Request(None, 50, 1, prefix, 20).prompt(i) for i, prefix in enumerate((0, 0, 1)))
    assert [len(prompt) for prompt in (a, b, c)] == [50] * 3
    assert a[:20] == b[:20] != c[:20]
    assert not set(a[20:]) & set(b[20:])
    assert not set(a + b) & set(c)


BOUND = 1.05
"""By how much more replicas may be worse: other requests meet in a step, and steps are whole."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [5.0, 20.0, 80.0])
def test_more_replicas_are_not_worse(rate: float, seed: int) -> None:
    trace = draw(load(rate, 200, seed=seed))
    found = [simulate(trace, COST, FleetOptions(n, "least-loaded", replica=SMALL)) for n in (1, 2, 4, 8, 16)]
    for few, many in pairwise(found):
        assert many.duration <= few.duration * BOUND
        assert mean_e2e(many) <= mean_e2e(few) * BOUND
    assert mean_e2e(found[-1]) < mean_e2e(found[0])


def mean_e2e(outcome: Outcome) -> float:
    return statistics.fmean(answer.e2e for answer in outcome.answers)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prefixes", [1, 4, 12])
def test_following_prefixes_hits_no_less_than_taking_turns(prefixes: int, seed: int) -> None:
    trace = draw(load(40.0, 200, shared_prefix=96, seed=seed), prefixes)
    rates = {
        routing: simulate(trace, COST, FleetOptions(4, routing, replica=SMALL)).summary()["prefix_hit_rate"]
        for routing in ("round-robin", "prefix")
    }
    assert rates["prefix"] >= rates["round-robin"]
    assert rates["prefix"] > 0


def test_routers_do_what_their_names_say() -> None:
    turns, least = RoundRobin(), LeastLoaded()
    assert [turns.choose([], [0, 9, 0]) for _ in range(4)] == [0, 1, 2, 0]
    assert [least.choose([], [1, 1, 2]) for _ in range(3)] == [0, 1, 0]
    prefix = PrefixAware()
    assert prefix.choose([b"a", b"b"], [1, 0, 0]) == 1
    assert prefix.choose([b"a", b"c"], [0, AHEAD, 0]) == 1
    assert prefix.choose([b"a"], [5, AHEAD + 1, 0]) == 2
    assert prefix.choose([b"a"], [0, 3, 2]) == 2  # two have it now
    with pytest.raises(UnknownName, match="routing"):
        make_router("prefx")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: FleetOptions(0),
        lambda: FleetOptions(1, router_s=-1.0),
        lambda: FleetOptions(1, router_s=float("nan")),
        lambda: simulate([], COST),
        lambda: simulate([Request(None, 1, 1)], COST, concurrency=0),
        lambda: draw(load(), 0),
        lambda: Request(None, 0, 1),
        lambda: Request(None, 1, 0),
        lambda: Request(None, 5, 1, 0, 6),
        lambda: Request(-1.0, 1, 1),
        lambda: Request(float("nan"), 1, 1),
        lambda: Request(None, True, 1),
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(UsageError):
        make()
