"""The simulation beside the server: the same requests to both, throughput and latencies next to each other.

    python benchmarks/bench_simulation.py [MODEL] [--rounds N] [--quick] [--write]

Each round: 16 clients, and requests at random moments, by `gossamer bench serve`, each on a fresh server that notes
its steps. Before and after, the same server gets calibration loads of other lengths, moments and numbers; the cost of a
step is fitted to the steps of those alone, half from either side, for the machine's speed drifts within minutes. The
same plans are simulated, and measured once more on another fresh server: how far the server is from itself is the least
that any simulation can be held to. A difference is simulated, or measured again, over measured, less one. Leave the
machine alone meanwhile: what others took is in the table. The last line is one JSON object; --write writes
docs/results/simulation.md. Exit code 1 if a request failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import serve_sides
from bench_cpu import say
from cpu_sides import Failed, Watch
from gossamer.measure.load.plan import Length, LoadPlan
from gossamer.measure.records import machine_block
from gossamer.settings import threads
from gossamer.simulate.cost import StepCost, StepWork, fit
from gossamer.simulate.fleet import FleetOptions, simulate
from gossamer.simulate.replica import ReplicaOptions
from gossamer.simulate.trace import draw

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results" / "simulation.md"
WANTED = 0.15
"""Largest difference of throughput and of a p99."""
LOAD_SECONDS = 900.0
BUSY = (0.4, 0.6)
"""Shares of what 16 clients get through that requests at random moments are sent at."""
REQUESTS = 256
"""Of each load: the p99 of fewer is the longest wait of all."""
ALONE = LoadPlan(requests=8, concurrency=1, input_tokens=Length(160, 120), output_tokens=Length(24, 8))
FEW = LoadPlan(requests=16, concurrency=4, input_tokens=Length(160, 120), output_tokens=Length(40, 24))
MANY = LoadPlan(requests=40, concurrency=24, input_tokens=Length(160, 144), output_tokens=Length(40, 32))
CLOSED = LoadPlan(requests=REQUESTS, concurrency=16, input_tokens=Length(128, 96), output_tokens=Length(64, 48))
OPEN = LoadPlan(requests=REQUESTS, rate=1.0, input_tokens=Length(128, 96), output_tokens=Length(64, 48))
FIGURES = {
    "requests/s": ("requests_per_s", None),
    "output tokens/s": ("output_tokens_per_s", None),
    "TTFT mean": ("ttft_s", "mean"),
    "TTFT p99": ("ttft_s", "p99"),
    "TPOT mean": ("tpot_s", "mean"),
    "TPOT p99": ("tpot_s", "p99"),
    "e2e mean": ("e2e_s", "mean"),
    "e2e p99": ("e2e_s", "p99"),
}
JUDGED = ("output tokens/s", "TTFT p99", "TPOT p99", "e2e p99")
"""What must be within WANTED."""


@dataclass
class Calibration:
    """What a server's own loads told, so far."""

    file: Path
    """Where it notes its steps."""
    steps: list[tuple[StepWork, float]] = field(default_factory=list)
    alone: list[tuple[LoadPlan, float]] = field(default_factory=list)
    """Loads of one client, and the median time to a first token."""

    def load(self, url: str, seed: int, quick: bool) -> None:
        """One client, then few and many, and the steps that they took. Raises Failed."""
        began = len(self.file.read_text().splitlines())
        plan = replace(ALONE, seed=seed)
        self.alone.append((plan, ask(url, plan)["ttft_s"]["median"]))
        for number, crowd in enumerate((FEW, MANY), 1):
            ask(url, shortened(replace(crowd, seed=seed + number), quick))
        lines = [json.loads(line) for line in self.file.read_text().splitlines()[began:]]
        self.steps += [(StepWork(*work), seconds) for seconds, *work in lines]

    def options(self) -> ReplicaOptions:
        """The server's."""
        blocks, batch_tokens, sequences = json.loads(self.file.read_text().splitlines()[0])
        return ReplicaOptions(16 * blocks, batch_tokens, sequences)

    def cost(self) -> StepCost:
        """Of a step, and of a request besides its steps."""
        cost, options = fit(self.steps), self.options()
        rest = [ttft - simulated(plan, cost, options)["ttft_s"]["median"] for plan, ttft in self.alone]
        return replace(cost, request_s=max(0.0, statistics.mean(rest)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few requests: does it work?")
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    args = parser.parse_args()
    if args.quick and args.write:
        parser.error("--quick measures nothing that is worth a page")
    rounds = [one_round(args.model, seed, args.quick) for seed in range(1, 2 if args.quick else args.rounds + 1)]
    run = {
        "benchmark": "bench_simulation",
        "command": " ".join(["python benchmarks/bench_simulation.py", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_block(),
        "model": args.model,
        "rounds": rounds,
    }
    text = page(run)
    print(text)
    if args.write:
        PAGE.write_text(text)
    print(json.dumps(run))
    return 0


def one_round(model: str, seed: int, quick: bool) -> dict[str, Any]:
    """All loads measured and simulated. Raises Failed."""
    say(f"round {seed}")
    closed = compared(model, shortened(replace(CLOSED, seed=seed), quick), quick)
    loads = {"16 clients": closed}
    for share in BUSY:
        rate = round(share * closed["measured"]["requests_per_s"], 2)
        plan = shortened(replace(OPEN, seed=seed, rate=rate), quick)
        loads[f"random moments, {share:.0%}"] = compared(model, plan, quick)
    return {"loads": loads}


def shortened(plan: LoadPlan, quick: bool) -> LoadPlan:
    return replace(plan, requests=24) if quick else plan


def compared(model: str, plan: LoadPlan, quick: bool) -> dict[str, Any]:
    """One load on a fresh server between two calibrations, in the simulation, and on another server. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="gossamer-simulation-") as folder:
        calibration, watch = Calibration(Path(folder, "steps")), Watch()
        with fresh_server(model, calibration.file) as url:
            calibration.load(url, 101, quick)
            measured = ask(url, plan)
            calibration.load(url, 201, quick)
        with fresh_server(model, Path(folder, "again")) as url:
            again = ask(url, plan)
        foreign = watch.foreign_cores()
        cost, options = calibration.cost(), calibration.options()
    say(f"  a step {cost.numbers()}, off by {cost.about['median_relative_error']:.1%} at the median")
    sides = {"measured": measured, "again": again, "simulated": simulated(plan, cost, options)}
    differences = {
        side: {name: round(figure(sides[side], name) / figure(measured, name) - 1, 4) for name in FIGURES}
        for side in ("again", "simulated")
    }
    for side, of_side in differences.items():
        say(f"  {side}: " + ", ".join(f"{name} {difference:+.1%}" for name, difference in of_side.items()))
    return sides | {
        "load": plan.protocol() | {"input_tokens": str(plan.input_tokens)},
        "differences": differences,
        "cost": asdict(cost),
        "options": asdict(options),
        "foreign": round(foreign, 2),
    }


@contextmanager
def fresh_server(model: str, steps: Path) -> Iterator[str]:
    """The address of a server that has answered its first requests and notes its steps. Raises Failed."""
    port = serve_sides.free_port()
    command = [sys.executable, str(HERE / "simulation_server.py"), model, str(port), str(steps)]
    with serve_sides.answering(command, {"PYTHONPATH": str(HERE)}, port, "simulation") as url:
        ask(url, replace(ALONE, requests=4, seed=100))  # whatever is slow the first time
        yield url


def figure(results: dict[str, Any], name: str) -> float:
    """One of FIGURES."""
    key, point = FIGURES[name]
    return float(results[key] if point is None else results[key][point])


def simulated(plan: LoadPlan, cost: StepCost, options: ReplicaOptions) -> dict[str, Any]:
    """The summary of one replica under a plan."""
    return simulate(draw(plan), cost, FleetOptions(1, replica=options), plan.concurrency).summary()


def ask(url: str, plan: LoadPlan) -> dict[str, Any]:
    """The results of `gossamer bench serve`, in a process of its own. Raises Failed, also if a request did."""
    words: list[object] = ["--requests", plan.requests, "--seed", plan.seed, "--warmup", 0, "--ignore-eos"]
    words += ["--input-tokens", plan.input_tokens, "--output-tokens", plan.output_tokens, "--endpoint", "completions"]
    words += ["--concurrency", plan.concurrency] if plan.rate is None else ["--request-rate", plan.rate]
    command = [sys.executable, "-m", "gossamer", "bench", "serve", url, *map(str, words), "--json", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
        results: dict[str, Any] = json.loads(done.stdout)["results"]
    except subprocess.TimeoutExpired as error:
        raise Failed(f"a load took more than {LOAD_SECONDS:.0f} s") from error
    except ValueError as error:
        raise Failed((done.stderr.strip().splitlines() or ["the load gave no result"])[-1][:300]) from error
    if results["failed"]:
        raise Failed(f"{results['failed']} requests failed: {results['failures']}")
    return results


def page(run: dict[str, Any]) -> str:
    """The whole of docs/results/simulation.md."""
    machine, rounds = run["machine"], run["rounds"]
    loads = list(rounds[0]["loads"])
    parts = [
        "# The simulation beside the server",
        f"    {run['command']}",
        f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores, {machine['os']}; {run['created'][:10]}. "
        f"{threads()} threads; {len(rounds)} rounds. {run['model']}"
        + (": its GGUF file was already 4-bit (Q4_1); held as bfloat16." if run["model"] == "smollm2" else "."),
        f"{1 + len(BUSY)} loads are measured and simulated: 16 clients, and requests at random moments at "
        f"{' and '.join(f'{share:.0%}' for share in BUSY)} of what 16 clients get through; each on a fresh server. "
        "Before and after it the same server gets calibration loads (other lengths, other seeds, 1, 4 and 24 clients), "
        "to whose steps alone the cost of a step is fitted: the speed of the machine drifts. A difference is simulated "
        f"over measured, less one; wanted: within {WANTED:.0%} for the figures in bold. p99 of {CLOSED.requests} "
        "requests is nearly the longest wait.",
        *(table(rounds, load) for load in loads),
        verdict(rounds),
        "## The cost of a step",
        cost_table(rounds),
    ]
    return "\n\n".join(parts) + "\n"


def table(rounds: Sequence[dict[str, Any]], load: str) -> str:
    """Measured, measured again and simulated of one load, in Markdown: for each round, a figure and two differences."""
    heads = [f"round {i + 1}: measured | again | simulated" for i in range(len(rounds))]
    lines = [f"### {load}", "", f"| | {' | '.join(heads)} |", "|---" * (3 * len(rounds) + 1) + "|"]
    for name in FIGURES:
        unit = 1.0 if name.endswith("/s") else 1000.0
        cells = []
        for found in (r["loads"][load] for r in rounds):
            cells.append(f"{unit * figure(found['measured'], name):,.1f}")
            cells += [f"{found['differences'][side][name]:+.1%}" for side in ("again", "simulated")]
        label = f"**{name}**" if name in JUDGED else name
        lines.append(f"| {label}{'' if unit == 1 else ', ms'} | {' | '.join(cells)} |")
    others = ", ".join(f"{r['loads'][load]['foreign']:.2f}" for r in rounds)
    rates = {r["loads"][load]["load"]["request_rate"] for r in rounds} - {None}
    sent = f"; {', '.join(f'{rate:g}' for rate in sorted(rates))} requests per second" if rates else ""
    return "\n".join([*lines, "", f"Others took {others} cores{sent}."])


def verdict(rounds: Sequence[dict[str, Any]]) -> str:
    """How many of the differences that matter are as small as wanted, and how many of the server's from itself are."""
    said = []
    for side, name in (("simulated", "The simulation"), ("again", "The server measured again")):
        sizes = {
            f"{figure} of {load}": [abs(r["loads"][load]["differences"][side][figure]) for r in rounds]
            for load in rounds[0]["loads"]
            for figure in JUDGED
        }
        single = [size <= WANTED for of_rounds in sizes.values() for size in of_rounds]
        medians = {what: statistics.median(of_rounds) for what, of_rounds in sizes.items()}
        missed = [f"{what} ({median:.0%})" for what, median in medians.items() if median > WANTED]
        said.append(
            f"- {name}: {sum(single)} of {len(single)} single differences within {WANTED:.0%}, the largest "
            f"{max(max(of_rounds) for of_rounds in sizes.values()):.0%}; of the medians of their sizes over the rounds "
            f"(without signs, which would cancel), {len(medians) - len(missed)} of {len(medians)}"
            f"{'; not ' + ', '.join(missed) if missed else ''}."
        )
    return "\n".join(said)


def cost_table(rounds: Sequence[dict[str, Any]]) -> str:
    """The fitted lines, in Markdown."""
    lines = [
        "| round | load | step, ms | prompt token, us | decoded token, us | context token, us | request, ms | steps "
        "| median error of a step |",
        "|---" * 9 + "|",
    ]
    for i, found in enumerate(rounds):
        for load, of_load in found["loads"].items():
            cost, about = of_load["cost"], of_load["cost"]["about"]
            lines.append(
                f"| {i + 1} | {load} | {1e3 * cost['step_s']:.2f} | {1e6 * cost['prompt_token_s']:.0f} "
                f"| {1e6 * cost['decode_token_s']:.0f} | {1e6 * cost['context_token_s']:.2f} "
                f"| {1e3 * cost['request_s']:.1f} | {about['steps']} | {about['median_relative_error']:.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
