"""Our CPU engine beside llama.cpp, OpenVINO, vLLM and transformers, each at its own best on the same machine.

    python benchmarks/bench_cpu.py [--rounds N] [--only ROW,ROW] [--quick] [--write]

Peers and model files are made below the cache when first asked for, which takes most of an hour. Samples of a row are
taken in turn, ours and theirs, so that a machine that drifts hits both. Leave the machine alone meanwhile. Progress
goes to stderr; a Markdown page and then one JSON line with every sample to stdout. Exit code 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import cpu_models
import cpu_report
import cpu_rows
import cpu_sides
import peers
from cpu_rows import LLAMA, LLAMA_AVX2, READ, Row
from cpu_sides import Failed, Side
from gossamer.errors import GossamerError
from gossamer.kernels.cpu import isas
from gossamer.measure.records import machine_block
from gossamer.settings import threads as default_threads

PAGE = Path(__file__).parent.parent / "docs" / "results" / ("cpu.md" if "avx512" in isas() else "cpu-avx2.md")
"""Two kinds of machine, two pages: ratios of one say little of the other."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    args = parse_arguments()
    rows = [cpu_rows.quick(row) if args.quick else row for row in args.only]
    bench = Bench(args.threads, 2 if args.quick else args.rounds)
    models = bench.prepare(rows)
    tokens = min(args.tokens, 4096) if args.quick else args.tokens
    judge = partial(cpu_models.divergences, models, args.corpus, tokens, args.threads)
    for name, kld in (guarded(judge, {}) if tokens else {}).items():
        models[name]["kld"] = kld
    try:
        results = [bench.run(row, rows[i + 1 :]) for i, row in enumerate(rows)]
    finally:
        bench.close()
    run = {
        "benchmark": "bench_cpu",
        "command": " ".join(["python benchmarks/bench_cpu.py", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_block(args.threads),
        "versions": bench.versions,
        "protocol": {
            "rounds": bench.rounds,
            "threads": args.threads,
            "corpus": "Python's own documentation" if args.corpus == "default" else Path(args.corpus).name,
            "tokens": tokens,
        },
        "models": models,
        "rows": [{**result, "verdict": cpu_report.verdict(result, models)} for result in results],
    }
    text = cpu_report.page(run)
    print(text)
    if args.write:
        PAGE.write_text(text)
    print(json.dumps(run))
    return int(any(result["reason"] for result in results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of samples for each row")
    parser.add_argument("--only", type=rows_argument, default=cpu_rows.ROWS, metavar="ROW,ROW", help="only these rows")
    parser.add_argument("--quick", action="store_true", help="2 rounds of a quarter of the output: does it work?")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--corpus", default="default", help="text that KL divergence is measured on, as for eval")
    parser.add_argument("--tokens", type=int, default=20480, help="tokens of that text; 0: not measured")
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    return parser.parse_args()


def rows_argument(keys: str) -> tuple[Row, ...]:
    try:
        return cpu_rows.chosen(keys)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Bench:
    """Takes samples of rows; children stay loaded as long as a later row needs them."""

    def __init__(self, threads: int, rounds: int) -> None:
        self.threads, self.rounds = threads, rounds
        self.versions: dict[str, str] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self._sides: dict[Hashable, Side | Failed] = {}
        self._missing: dict[str, str] = {}
        """Peers and model files that could not be made, and why."""
        self._facts: dict[str, dict[str, Any]] = {}
        """What our engine said of itself, by row."""

    def prepare(self, rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
        """Make every peer and every file before anything is timed; what is known of each file."""
        for row in rows:
            if row.peer != READ:
                self._try(row.peer, lambda peer=row.peer: peers.folder_of(peer))  # type: ignore[misc]
            for name in row.models:
                if name not in self.models:
                    self._try(name, lambda name=name: self._learn(name))  # type: ignore[misc]
        return self.models

    def run(self, row: Row, later: Iterable[Row]) -> dict[str, Any]:
        """All samples of one row; a failure is a result that says why."""
        samples: dict[str, list[float]] = {"ours": [], "peer": [], "foreign_cores": []}
        reason = next((self._missing[name] for name in (row.peer, *row.models) if name in self._missing), None)
        try:
            if reason is None:
                self._sample(row, samples)
        except Failed as error:
            reason = str(error)
        self._close_unneeded(later)
        pairs = cpu_report.ratios(samples["ours"], samples["peer"]) if reason is None else []
        result = {
            "key": row.key,
            "title": row.title,
            "ours": row.ours,
            "peer": row.peer,
            "theirs": row.theirs,
            "threads": row.threads or self.threads,
            "engine": self._facts.get(row.key),
            "request": vars(row.request),
            "samples": samples,
            "ratios": [round(pair, 4) for pair in pairs],
            "ratio": round(statistics.median(pairs), 4) if pairs else None,
            "wanted": row.wanted,
            "reason": reason,
        }
        say(f"{row.key}: {cpu_report.verdict(result, self.models)} {result['ratio'] or ''} (wanted {row.wanted})")
        return result

    def close(self) -> None:
        self._close_unneeded(())

    def _sample(self, row: Row, samples: dict[str, list[float]]) -> None:
        """Rounds of ours and theirs in turn, behind one of each that does not count."""
        ours, peer = self._side(self._our_key(row)), self._side(self._peer_key(row))
        self._facts[row.key] = ours.facts
        bytes_per_token = self._bytes_per_token(row, ours) if row.peer == READ else 1.0
        with cpu_sides.competitor(row.busy):
            watch = cpu_sides.Watch()
            for turn in range(self.rounds + 1):
                pair = ours.sample(row.request) * bytes_per_token, peer.sample(row.request)
                foreign = watch.foreign_cores()
                if turn:
                    samples["foreign_cores"].append(round(foreign, 2))
                    samples["ours"].append(pair[0])
                    samples["peer"].append(pair[1])
                    say(f"  {row.key} {turn}: {pair[0]:,.4g} beside {pair[1]:,.4g}")

    def _bytes_per_token(self, row: Row, ours: Side) -> float:
        """Bytes of weights and KV cache that one decoded token reads, halfway through the output."""
        context = row.request.context + row.request.output / 2
        return float(self.models[row.ours]["read_bytes"] + ours.facts["kv_bytes_per_token"] * context)

    def _our_key(self, row: Row) -> tuple[Any, ...]:
        return "gossamer", row.ours, row.threads or self.threads, row.isa

    def _peer_key(self, row: Row) -> tuple[Any, ...]:
        return row.peer, row.theirs, row.threads or self.threads, None

    def _side(self, key: tuple[Any, ...]) -> Side:
        """The side of this key, started if it is not there. Raises Failed, and again for each row that needs it."""
        if key not in self._sides:
            say(f"starting {' '.join(str(part) for part in key if part is not None)}")
            try:
                self._sides[key] = start(*key)
            except Failed as error:
                self._sides[key] = error
            else:
                self._note_version(key[0], self._sides[key])
        side = self._sides[key]
        if isinstance(side, Failed):
            raise side
        return side

    def _note_version(self, peer: str, side: Side | Failed) -> None:
        if isinstance(side, Side) and "version" in side.facts:
            self.versions.setdefault(peer, side.facts["version"])

    def _close_unneeded(self, later: Iterable[Row]) -> None:
        """Stop what no later row needs, and what failed, which is not tried again."""
        needed = {key for row in later for key in (self._our_key(row), self._peer_key(row))}
        for key in [key for key in self._sides if key not in needed]:
            side = self._sides.pop(key)
            if isinstance(side, Side):
                side.close()

    def _learn(self, name: str) -> None:
        cpu_models.path_of(name)
        self.models[name] = cpu_models.facts_of(name)

    def _try(self, name: str, make: Callable[[], object]) -> None:
        if name not in self._missing:
            try:
                make()
            except MAKING as error:
                self._missing[name] = f"{name} could not be made: {short(error)}"
                say(self._missing[name])


MAKING = (subprocess.SubprocessError, OSError, GossamerError, KeyError, StopIteration)
"""What may happen while a peer or a model file is made."""


def start(peer: str, model: str, threads: int, isa: str | None) -> Side:
    """A side that is ready to be timed. Raises Failed."""
    if peer == READ:
        return cpu_sides.Memory(threads)
    path = cpu_models.path_of(model)
    if peer == "gossamer":
        return cpu_sides.gossamer(path, threads, isa)
    if peer in (LLAMA, LLAMA_AVX2):
        return cpu_sides.LlamaCpp(path, threads, avx512=peer == LLAMA)
    launch = {"openvino": cpu_sides.openvino, "vllm": cpu_sides.vllm, "transformers": cpu_sides.transformers}[peer]
    return launch(peers.python_of(peer), path, threads)


def guarded(work: Callable[[], dict[str, Any]], instead: dict[str, Any]) -> dict[str, Any]:
    """What the work gives; if it fails, the speed is still worth measuring."""
    try:
        return work()
    except MAKING as error:
        say(f"KL divergence could not be measured: {short(error)}")
        return instead


def short(error: BaseException) -> str:
    """One line for a table."""
    output = getattr(error, "stderr", None)
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or str(error)
    return text.strip().splitlines()[-1][:300] if text.strip() else type(error).__name__


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
