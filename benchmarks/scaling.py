"""How far replicas and ranks carry, and what they wait for then: the curves and tables of docs/scaling.md.

    python benchmarks/scaling.py [--cost FILE] [--largest N] [--write]

Replicas are simulated (`gossamer simulate`), with the cost of a step in benchmarks/costs/smollm2-int4.json; ranks are
the formulas of `gossamer plan`, for a model in the shape of LLaMA 3 8B whose linear layers are 4-bit integers, on
machines and links whose numbers are below. --write puts the tables into docs/scaling.md, between its marks, and the
curves beside it in docs/images. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gossamer.formats import Dense, Format, Integer
from gossamer.measure.load.plan import Length, LoadPlan
from gossamer.model.config import LayerConfig, ModelConfig, Rope
from gossamer.model.families import tensor_names
from gossamer.parallel import make_plan
from gossamer.parallel.roofline import Link, Node, Step, estimate, place
from gossamer.simulate.cost import StepCost, read_cost
from gossamer.simulate.fleet import FleetOptions, simulate
from gossamer.simulate.replica import ReplicaOptions
from gossamer.simulate.trace import draw
from line_chart import Line, Panel, chart

HERE = Path(__file__).parent
COST = HERE / "costs" / "smollm2-int4.json"
PAGE = HERE.parent / "docs" / "scaling.md"
IMAGES = HERE.parent / "docs" / "images"

REPLICAS = (1, 10, 30, 100, 300, 1000)
ROUTINGS = ("round-robin", "least-loaded", "prefix")
PER_REPLICA = 10
"""Requests for each replica, so that all sizes run for as long."""
LOAD = LoadPlan(
    rate=1.0, input_tokens=Length(64, 32), output_tokens=Length(64, 32), shared_prefix=256, ignore_eos=True, seed=1
)
PREFIXES = 100
REPLICA = ReplicaOptions(kv_tokens=16384)
BUSY, TOGETHER = 0.6, 8
"""Traffic: this share of what a replica computes with so many requests in a step and nothing in its cache."""
FIXED_REPLICAS, FIXED_REQUESTS = 30, 2000
"""Fixed traffic is that of so many replicas."""
ROUTER_S = 0.5e-3
"""Of one request in the router: what a proxy in Python takes."""

LAYER = LayerConfig(num_heads=32, num_kv_heads=8, head_dim=128, ffn_width=14336)
SHAPE = ModelConfig("llama", 128256, 4096, (LAYER,) * 32, 1e-5, Rope(), "silu", False, 8192)
RANKS = (1, 2, 4, 8, 16)
NODE = Node(bytes_per_s=100e9, macs_per_s=2e12)
LINKS = {
    "1 Gbit/s, 100 us": Link(1e9 / 8, 100e-6),
    "10 Gbit/s, 50 us": Link(10e9 / 8, 50e-6),
    "100 Gbit/s, 5 us": Link(100e9 / 8, 5e-6),
    "400 Gbit/s, 2 us": Link(400e9 / 8, 2e-6),
}
BATCHES = (1, 32)
CONTEXT = 1024
MARK = re.compile(r"(<!-- figures: begin -->\n).*?(<!-- figures: end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", type=Path, default=COST, help="what a step costs, of `gossamer simulate --measure`")
    parser.add_argument("--largest", type=int, default=max(REPLICAS), help="most replicas")
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md and its images")
    args = parser.parse_args()
    cost, sizes = read_cost(args.cost), [n for n in REPLICAS if n <= args.largest]
    rate = rate_of(cost)
    run = {
        "benchmark": "scaling",
        "rate": rate,
        "proportional": [fleet(cost, n, routing, rate * n, PER_REPLICA * n) for n in sizes for routing in ROUTINGS],
        "fixed": [
            fleet(cost, n, routing, rate * FIXED_REPLICAS, FIXED_REQUESTS)
            for n in sizes
            for routing in ROUTINGS
            if n >= FIXED_REPLICAS
        ],
        "ranks": [ranks(name, tp, batch) for name in LINKS for batch in BATCHES for tp in RANKS],
    }
    text = tables(run, cost)
    print(text)
    if args.write:
        PAGE.write_text(MARK.sub(lambda found: f"{found[1]}{text}\n{found[2]}", PAGE.read_text()))
        for name, panels in pictures(run).items():
            (IMAGES / name).write_text(chart(panels))
    print(json.dumps(run))


def rate_of(cost: StepCost) -> float:
    """Requests per second for each replica."""
    prompt, answer = LOAD.shared_prefix + LOAD.input_tokens.mean, LOAD.output_tokens.mean
    decoded = answer * (cost.decode_token_s + cost.step_s / TOGETHER)
    return round(BUSY / (prompt * cost.prompt_token_s + decoded), 3)


def fleet(cost: StepCost, replicas: int, routing: Any, rate: float, requests: int) -> dict[str, Any]:
    """One simulation."""
    began = time.perf_counter()
    options = FleetOptions(replicas, routing, ROUTER_S, REPLICA)
    trace = draw(replace(LOAD, rate=rate, requests=requests), PREFIXES)
    results = simulate(trace, cost, options).summary()
    took = time.perf_counter() - began
    print(f"{replicas} replicas, {routing}, {rate:g}/s: {took:.1f} s", file=sys.stderr, flush=True)
    return {"replicas": replicas, "routing": routing, "rate": rate, "simulated_in_s": round(took, 1), **results}


def ranks(link: str, tp: int, batch: int) -> dict[str, Any]:
    """One step of the model in `tp` ranks on as many nodes."""
    forms = {name: form_of(name, shape) for name, shape in tensor_names(SHAPE).items()}
    stages = make_plan(SHAPE, forms, tp, 1).stages(forms, 2)
    inside = Link(NODE.bytes_per_s, 5e-6)  # which nothing takes: each rank has a node
    step: Step = estimate(stages, 4 * SHAPE.hidden_size, place(tp, tp), NODE, inside, LINKS[link], batch, CONTEXT)
    return {"link": link, "tp": tp, "tokens_per_s": step.tokens_per_s, "bottleneck": step.bottleneck, **asdict(step)}


def form_of(name: str, shape: tuple[int, ...]) -> Format:
    """4-bit integers in groups of 64 for linear layers and head, bfloat16 for the rest."""
    return Integer(4, 64) if len(shape) == 2 and "embed" not in name else Dense()


def tables(run: dict[str, Any], cost: StepCost) -> str:
    """Everything between the marks."""
    of = cost.about
    parts = [
        f"A step of {of.get('model')} takes {cost.step_s * 1e3:.2f} ms, and {cost.prompt_token_s * 1e6:,.0f} us for "
        f"each token of a prompt, {cost.decode_token_s * 1e6:,.0f} us for each that is decoded and "
        f"{cost.context_token_s * 1e6:.2f} us for each of context: {of.get('source') or of.get('backend')}.",
        f"### Traffic in proportion: {run['rate']:g} requests per second for each replica",
        "![Throughput, p99 TTFT and prefix hits against replicas, traffic in proportion](images/scaling-replicas.svg)",
        fleet_table(run["proportional"]),
        f"### Fixed traffic: {run['rate'] * FIXED_REPLICAS:g} requests per second over all",
        "![p99 TTFT, utilisation and prefix hits against replicas, fixed traffic](images/scaling-fixed.svg)",
        fleet_table(run["fixed"]),
        "### Tensor parallelism over links",
        "![Tokens per second against ranks, over four links](images/scaling-ranks.svg)",
        rank_table(run["ranks"]),
    ]
    return "\n\n".join(parts)


def fleet_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| replicas | routing | output tokens/s | for each | TTFT p50, ms | TTFT p99, ms | TPOT p99, ms | busy "
        "| busiest / mean | router busy | prefix hits | simulated in, s |",
        "|---:|---|" + "---:|" * 10,
    ]
    for r in rows:
        lines.append(
            f"| {r['replicas']:,} | {r['routing']} | {r['output_tokens_per_s']:,.0f} "
            f"| {r['output_tokens_per_s'] / r['replicas']:,.1f} | {1e3 * r['ttft_s']['median']:,.0f} "
            f"| {1e3 * r['ttft_s']['p99']:,.0f} | {1e3 * r['tpot_s']['p99']:,.1f} | {r['utilisation']:.0%} "
            f"| {r['busiest_over_mean']:.2f} | {r['router_utilisation']:.0%} | {r['prefix_hit_rate']:.0%} "
            f"| {r['simulated_in_s']:.1f} |"
        )
    return "\n".join(lines)


def rank_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"| link | batch | {' | '.join(f'{tp} ranks' if tp > 1 else '1 rank' for tp in RANKS)} |",
        "|---|---:|" + "---|" * len(RANKS),
    ]
    for link in LINKS:
        for batch in BATCHES:
            cells = [
                f"{r['tokens_per_s']:,.0f} ({r['bottleneck']})"
                for r in rows
                if (r["link"], r["batch"]) == (link, batch)
            ]
            lines.append(f"| {link} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pictures(run: dict[str, Any]) -> dict[str, list[Panel]]:
    """File name -> panels."""
    latency = ("TTFT p99, ms", lambda r: 1e3 * r["ttft_s"]["p99"])
    hits = ("prefix hits, % of prompt tokens", lambda r: 100 * r["prefix_hit_rate"])
    shown = {
        "scaling-replicas.svg": (
            "proportional",
            ("output tokens/s", lambda r: r["output_tokens_per_s"]),
            latency,
            hits,
        ),
        "scaling-fixed.svg": ("fixed", ("mean utilisation, %", lambda r: 100 * r["utilisation"]), latency, hits),
    }
    found = {
        file: [
            Panel(name, "replicas", [lines(run[part], "routing", way, "replicas", at) for way in ROUTINGS])
            for name, at in panels
        ]
        for file, (part, *panels) in shown.items()
    }
    found["scaling-ranks.svg"] = [
        Panel(
            f"tokens/s at batch {batch}",
            "ranks, each on a node of its own",
            [
                lines([r for r in run["ranks"] if r["batch"] == batch], "link", link, "tp", lambda r: r["tokens_per_s"])
                for link in LINKS
            ],
        )
        for batch in BATCHES
    ]
    return found


def lines(rows: Sequence[dict[str, Any]], key: str, name: str, x: str, y: Callable[[dict[str, Any]], float]) -> Line:
    """Those rows that have this name; what is 0 has no place on a logarithmic axis."""
    return Line(name, [(row[x], y(row)) for row in rows if row[key] == name and y(row) > 0])


if __name__ == "__main__":
    main()
