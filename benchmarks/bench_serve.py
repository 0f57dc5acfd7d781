"""Our server beside llama-server and vLLM's, under the same load from the same clients on the same machine.

    python benchmarks/bench_serve.py [--rounds N] [--only ROW,ROW] [--quick] [--write]

Peers and model files are made below the cache when first asked for. A server is started for each sample, alone; rounds
take turns, ours and theirs. Each peer first shows on a short load which of its settings is the fastest (--no-tune: the
first is taken). Leave the machine alone meanwhile. Progress goes to stderr; a Markdown page and then one JSON line with
every sample to stdout. Exit code 1 if a row failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import cpu_models
import serve_report
import serve_rows
import serve_sides
from bench_cpu import MAKING, guarded, say, short
from cpu_sides import Failed, Watch
from gossamer.checkpoint import open_checkpoint
from gossamer.measure.load import prompts
from gossamer.measure.load.plan import LoadPlan, parse_length
from gossamer.measure.records import machine_block
from gossamer.settings import threads as default_threads
from serve_rows import Load, Row, Side
from serve_sides import VARIANTS, VERSIONS, Variant

PAGE = Path(__file__).parent.parent / "docs" / "results" / "serve.md"
LOAD_SECONDS = 1800.0
"""For one load, and for a request of it: a peer may be slow."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    args = parse_arguments()
    rows = [serve_rows.quick(row) if args.quick else row for row in args.only]
    with tempfile.TemporaryDirectory(prefix="gossamer-serve-") as folder:
        bench = Bench(args.threads, 1 if args.quick else args.rounds, Path(folder))
        bench.prepare(rows, tune=args.tune and not args.quick)
        tokens = 0 if args.quick else args.tokens
        judge = partial(cpu_models.divergences, bench.models, args.corpus, tokens, args.threads)
        for name, kld in (guarded(judge, {}) if tokens else {}).items():
            bench.models[name]["kld"] = kld
        results = [bench.run(row) for row in rows]
    run = {
        "benchmark": "bench_serve",
        "command": " ".join(["python benchmarks/bench_serve.py", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_block(args.threads),
        "versions": {server: VERSIONS[server] for row in rows for server in (row.ours.server, row.peer.server)},
        "protocol": {
            "rounds": bench.rounds,
            "threads": args.threads,
            "corpus": "Python's own documentation" if args.corpus == "default" else Path(args.corpus).name,
            "tokens": tokens,
        },
        "settings": bench.settings,
        "tuning": bench.tuning,
        "models": bench.models,
        "rows": [{**result, "verdict": serve_report.verdict(result, bench.models)} for result in results],
    }
    text = serve_report.page(run)
    print(text)
    if args.write:
        PAGE.write_text(text)
    print(json.dumps(run))
    return int(any(result["reason"] for result in results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="pairs of samples for each row")
    parser.add_argument(
        "--only", type=rows_argument, default=serve_rows.ROWS, metavar="ROW,ROW", help="only these rows"
    )
    parser.add_argument("--quick", action="store_true", help="one round of a few requests: does it work?")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="peers run with their first setting")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--corpus", default="default", help="text that KL divergence is measured on, as for eval")
    parser.add_argument("--tokens", type=int, default=20480, help="tokens of that text; 0: not measured")
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    args = parser.parse_args()
    if args.quick and args.write:
        parser.error("--quick measures nothing that is worth a page")
    return args


def rows_argument(keys: str) -> tuple[Row, ...]:
    try:
        return serve_rows.chosen(keys)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Bench:
    """Takes samples of rows, each from a server of its own."""

    def __init__(self, threads: int, rounds: int, folder: Path) -> None:
        self.threads, self.rounds, self.folder = threads, rounds, folder
        self.models: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        """Server -> model -> how it was started."""
        self.tuning: list[dict[str, Any]] = []
        """What the settings that were tried gave."""
        self._variants: dict[Side, Variant] = {}
        self._missing: dict[str, str] = {}
        """Servers and model files that could not be made, and why."""

    def prepare(self, rows: list[Row], tune: bool) -> None:
        """Make every server and every file, and choose the peers' settings, before anything is timed."""
        for row in rows:
            for side in (row.ours, row.peer):
                self._try(side.server, partial(serve_sides.make, side.server))
                self._try(side.model, partial(self._learn, side.model))
        for row in rows:
            for side in (row.ours, row.peer):
                if side not in self._variants and not self._reason(row):
                    self._choose(side, row.load, tune)

    def run(self, row: Row) -> dict[str, Any]:
        """All samples of one row; a failure is a result that says why."""
        samples: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        foreign: list[float] = []
        reason = self._reason(row)
        try:
            if reason is None:
                self._sample(row, samples, foreign)
        except Failed as error:
            reason = str(error)
        result: dict[str, Any] = {
            "key": row.key,
            "title": row.title,
            "ours": asdict(row.ours),
            "peer": asdict(row.peer),
            "load": {"ours": asdict(row.load_of("ours")), "peer": asdict(row.load_of("peer"))},
            "metric": row.metric,
            "wanted": row.wanted,
            "p99_ttft": row.p99_ttft,
            "samples": samples,
            "foreign_cores": foreign,
            "reason": reason,
        }
        pairs = serve_report.pair_ratios(result) if reason is None else []
        result |= {
            "ratios": [round(r, 4) for r in pairs],
            "ratio": round(statistics.median(pairs), 4) if pairs else None,
        }
        say(f"{row.key}: {serve_report.verdict(result, self.models)} {result['ratio'] or ''} (wanted {row.wanted})")
        return result

    def _sample(self, row: Row, samples: dict[str, list[dict[str, Any]]], foreign: list[float]) -> None:
        """Rounds of ours and theirs in turn. Raises Failed; rows keep whole pairs."""
        for turn in range(self.rounds):
            pair = []
            for name, side in (("ours", row.ours), ("peer", row.peer)):
                pair.append(self._load(side, self._variants[side], row.load_of(name), seed=turn + 1))
            foreign += [results["foreign_cores"] for results in pair]
            for name, results in zip(samples, pair, strict=True):
                samples[name].append(results)
            shown = (serve_report.values([results], row.metric)[0] for results in pair)
            say(f"  {row.key} {turn + 1}: {' beside '.join(f'{value:,.4g}' for value in shown)}")

    def _load(self, side: Side, variant: Variant, load: Load, seed: int) -> dict[str, Any]:
        """The results of one load on a fresh server. Raises Failed, also if a single request did."""
        asked = self._prompts(load, seed)
        with serve_sides.running(side, variant, self.threads) as url:
            watch = Watch()  # of the load only: when a server ends, its children's seconds are lost
            results = ask(url, load, asked, seed)
            results["foreign_cores"] = round(watch.foreign_cores(), 2)
        if results["failed"]:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in results["failures"].items())
            raise Failed(f"{side.server}: {results['failed']} requests failed: {reasons}")
        return results

    def _choose(self, side: Side, load: Load, tune: bool) -> None:
        """The fastest way to start a server, by a third of the load; or the first, where none is to be tried."""
        variants = VARIANTS[side.server]
        speeds: dict[str, float] = {}
        if tune and len(variants) > 1:
            part = replace(load, requests=max(load.requests // 3, load.concurrency))
            for variant in variants:
                try:
                    speeds[variant.name] = self._load(side, variant, part, seed=0)["output_tokens_per_s"]
                except Failed as error:
                    say(f"  {side.server} {side.model}, {variant.name}: {error}")
                else:
                    say(f"  {side.server} {side.model}, {variant.name}: {speeds[variant.name]:,.4g}")
        best = max(variants, key=lambda variant: speeds.get(variant.name, 0.0))
        self._variants[side] = best
        self.tuning.append({**asdict(side), "output_tokens_per_s": speeds, "chosen": best.name})
        command, environment = serve_sides.launch(side, best, 8000, self.threads)
        path = str(cpu_models.path_of(side.model))
        words = [Path(command[0]).name, *(word.replace(path, side.model) for word in command[1:])]
        self.settings.setdefault(side.server, {})[side.model] = {
            "variant": best.name,
            "command": " ".join(words),
            "environment": {name: value for name, value in environment.items() if "/" not in value},
        }

    def _prompts(self, load: Load, seed: int) -> Path:
        """A file with the prompts of a load; the same load and seed give the same file."""
        path = self.folder / f"{abs(hash(load))}-{seed}.jsonl"
        if not path.exists():
            asks = asyncio.run(make_prompts(load, seed, open_checkpoint(cpu_models.path_of("bf16")).tokenizer().encode))
            path.write_text("".join(json.dumps({"prompt": a.prompt, "max_tokens": a.max_tokens}) + "\n" for a in asks))
        return path

    def _learn(self, name: str) -> None:
        cpu_models.path_of(name)
        self.models[name] = cpu_models.facts_of(name)

    def _reason(self, row: Row) -> str | None:
        """Why a row cannot be measured at all."""
        needed = (row.ours.server, row.peer.server, *row.models)
        return next((self._missing[name] for name in needed if name in self._missing), None)

    def _try(self, name: str, make: Callable[[], object]) -> None:
        if name in self._missing or name in self.models:
            return
        try:
            make()
        except MAKING as error:
            self._missing[name] = f"{name} could not be made: {short(error)}"
            say(self._missing[name])


async def make_prompts(load: Load, seed: int, encode: Callable[[str], list[int]]) -> list[prompts.Ask]:
    """Random prompts of a load, their lengths counted by a tokenizer; a prefix is shared, or each prompt's own."""

    async def count(text: str) -> int:
        return len(encode(text))

    plan = LoadPlan(
        requests=load.requests,
        input_tokens=parse_length(load.prompts),
        output_tokens=parse_length(load.outputs),
        shared_prefix=load.prefix,
        seed=seed,
    )
    asks = await prompts.synthetic(plan, prompts.Ruler(), count)
    if not load.prefix:
        return asks
    if load.shared:
        prefix = await prompts.shared_prefix(plan, prompts.Ruler(), count)
        return [ask.after(prefix) for ask in asks]
    seeds = (replace(plan, seed=seed * 100_000 + i) for i in range(1, load.requests + 1))
    prefixes = [await prompts.shared_prefix(own, prompts.Ruler(), count) for own in seeds]
    return [ask.after(prefix) for ask, prefix in zip(asks, prefixes, strict=True)]


def ask(url: str, load: Load, asked: Path, seed: int) -> dict[str, Any]:
    """The results of `gossamer bench serve`, in a process of its own. Raises Failed."""
    words = ["bench", "serve", url, "--prompts", asked, "--requests", load.requests, "--concurrency", load.concurrency]
    words += ["--endpoint", "completions", "--temperature", 0, "--ignore-eos", "--seed", seed, "--warmup", load.warmup]
    words += ["--timeout", LOAD_SECONDS]
    command = [sys.executable, "-m", "gossamer", *map(str, words), "--json", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
        return dict(json.loads(done.stdout)["results"])
    except subprocess.TimeoutExpired as error:
        raise Failed(f"a load took more than {LOAD_SECONDS:.0f} s") from error
    except ValueError as error:
        raise Failed((done.stderr.strip().splitlines() or ["the load gave no result"])[-1][:300]) from error


if __name__ == "__main__":
    sys.exit(main())
