"""`gossamer simulate`: replicas under a load, without computing a token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UsageError
from ._console import emit_json, progress, remark
from ._options import Json, Quiet
from .eval import make_table, number

if TYPE_CHECKING:
    from ..measure.load.plan import LoadPlan
    from ..simulate.cost import StepCost
    from ..simulate.fleet import FleetOptions
    from ..simulate.trace import Request


def simulate(
    cost: Annotated[Path | None, typer.Option("--cost", help="What a step costs, as --measure writes it.")] = None,
    measure: Annotated[
        str | None, typer.Option("--measure", help="Measure that on this machine first; --cost FILE keeps it.")
    ] = None,
    replicas: Annotated[int, typer.Option("--replicas", "-r", help="Engines behind the router.")] = 1,
    routing: Annotated[
        Literal["round-robin", "least-loaded", "prefix"],
        typer.Option("--routing", help="Which gets a request; prefix: who had its beginning, if not too busy."),
    ] = "least-loaded",
    rate: Annotated[
        float | None, typer.Option("--rate", help="Requests per second over all, at random moments.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", help="Instead: requests under way at a time (default: 8).")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Instead: a .jsonl file of requests and when they come.")
    ] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", help="How many requests.")] = 1000,
    input_tokens: Annotated[
        str, typer.Option("--input-tokens", help="Tokens of a prompt.", metavar="MEAN[:SPREAD]")
    ] = "256",
    output_tokens: Annotated[
        str, typer.Option("--output-tokens", help="Tokens of an answer.", metavar="MEAN[:SPREAD]")
    ] = "128",
    shared_prefix: Annotated[
        int, typer.Option("--shared-prefix", help="Tokens that stand before every prompt.", metavar="TOKENS")
    ] = 0,
    prefixes: Annotated[int, typer.Option("--prefixes", help="So many different ones, one of them each.")] = 1,
    kv_tokens: Annotated[int, typer.Option("--kv-tokens", help="Tokens that a replica's KV cache holds.")] = 65536,
    max_sequences: Annotated[int, typer.Option("--max-sequences", help="Most requests that run together.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option("--max-batch-tokens", help="Most tokens of a step.")] = 512,
    prefix_reuse: Annotated[
        bool,
        typer.Option("--prefix-reuse/--no-prefix-reuse", help="Keep keys and values for prompts that begin alike."),
    ] = True,
    router_us: Annotated[
        float, typer.Option("--router-us", help="Microseconds that the router takes for a request.")
    ] = 0.0,
    goodput: Annotated[
        str | None,
        typer.Option("--goodput", help="Count requests within these milliseconds.", metavar="ttft:500,tpot:50"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed asks the same, at the same moments.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate engines behind a router: throughput, TTFT, TPOT and whole time, how busy they are, prefix hits.

    The scheduler and the KV blocks are the engine's own; a step takes what a line through measured steps says. The load
    is that of `gossamer bench serve` with the same options and seed, every answer at its full length.

    \\b
    gossamer simulate --measure smollm2 --cost smollm2.json --rate 2
    gossamer simulate --cost smollm2.json --replicas 100 --rate 150 --shared-prefix 512 --prefixes 50 --routing prefix
    """
    from ..measure.load.plan import LoadPlan, parse_goodput, parse_length
    from ..simulate import fleet
    from ..simulate.replica import ReplicaOptions
    from ..simulate.trace import draw, read_trace

    if sum(way is not None for way in (rate, concurrency, trace)) > 1:
        raise UsageError("--rate, --concurrency and --trace are three ways to send", hint="give one of them")
    plan = LoadPlan(
        requests=requests,
        concurrency=8 if concurrency is None else concurrency,
        rate=rate,
        input_tokens=parse_length(input_tokens),
        output_tokens=parse_length(output_tokens),
        shared_prefix=shared_prefix,
        seed=seed,
        ignore_eos=True,
        goodput=parse_goodput(goodput) if goodput is not None else {},
    )
    options = fleet.FleetOptions(
        replicas=replicas,
        routing=routing,
        router_s=router_us / 1e6,
        replica=ReplicaOptions(kv_tokens, max_batch_tokens, max_sequences, prefix_reuse),
    )
    asked = draw(plan, prefixes) if trace is None else read_trace(trace)
    with progress(quiet) as report:
        costs = _cost(cost, measure, report)
        outcome = fleet.simulate(asked, costs, options, plan.concurrency, report)
    results = outcome.summary(plan.goodput)
    if json:
        emit_json(_record(costs, options, plan, asked, trace, prefixes, results))
        return
    _show(costs, options, results)
    if not quiet and results["utilisation"] > 0.95 and asked[0].arrival is not None:
        remark("the replicas were always busy: requests came faster than they were answered, and waits grow with time")


def _cost(cost: Path | None, model: str | None, report: Any) -> StepCost:
    """What a step costs, from a file or from this machine. Raises UsageError if nobody said."""
    from ..simulate.cost import read_cost, write_cost

    if model is not None:
        from ..simulate.measure import measure_cost

        measured = measure_cost(model, report)
        if cost is not None:
            write_cost(cost, measured)
        return measured
    if cost is None:
        raise UsageError("nobody says what a step costs", hint="--measure MODEL measures it, --cost FILE has it")
    return read_cost(cost)


def _record(
    cost: StepCost,
    options: FleetOptions,
    plan: LoadPlan,
    asked: list[Request],
    trace: Path | None,
    prefixes: int,
    results: dict[str, Any],
) -> dict[str, Any]:
    """One JSON object: what was simulated and what came out."""
    from dataclasses import asdict

    drawn = {"trace": trace.name, "requests": len(asked)} if trace is not None else None
    load = drawn or {**plan.protocol(), "input_tokens": str(plan.input_tokens), "prefixes": prefixes}
    return {"kind": "simulation", "cost": asdict(cost), "fleet": asdict(options), "load": load, "results": results}


def _show(cost: StepCost, options: FleetOptions, results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=10_000)
    rates = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
    shares = ("utilisation", "router_utilisation", "prefix_hit_rate")
    names = ["replicas", "requests", "seconds", "requests/s", "output tokens/s", "all tokens/s"]
    cells = [f"{options.replicas:,}", f"{results['completed']:,}", number(results["duration_s"], 1)]
    cells += [number(results[name], 1) for name in rates] + [f"{results[name]:.1%}" for name in shares]
    names += ["busy", "router busy", "prefix hits", "preempted"]
    cells.append(f"{results['preemptions']:,}")
    if results["goodput"] is not None:
        names.append("goodput/s")
        cells.append(f"{number(results['goodput']['requests_per_s'], 2)} ({results['goodput']['share']:.0%})")
    screen.print(make_table(names, [cells]))
    screen.print()
    rows = []
    for name in ("ttft", "tpot", "itl", "e2e"):
        found = results[f"{name}_s"] or {}
        points = [found.get(point) for point in ("mean", "median", "p90", "p99")]
        rows.append([name.upper() if name != "e2e" else name, *(number(s and s * 1000, 1) for s in points)])
    screen.print(make_table(["ms", "mean", "median", "p90", "p99"], rows))
    screen.print(Text(_said(cost, options), style="dim"))


def _said(cost: StepCost, options: FleetOptions) -> str:
    """What was simulated, in one line."""
    of = cost.about.get("model", "a model that nobody named")
    replica = options.replica
    return (
        f"{options.routing}; a step of {of}: {cost.step_s * 1e3:.3g} ms, and us for each token of a prompt "
        f"{cost.prompt_token_s * 1e6:.3g}, decoded {cost.decode_token_s * 1e6:.3g}, of context "
        f"{cost.context_token_s * 1e6:.3g}; {replica.max_batch_tokens} tokens and {replica.max_sequences} sequences a "
        f"step, {replica.kv_tokens:,} tokens of KV cache{'' if replica.prefix_reuse else ', no prefix reuse'}"
    )
