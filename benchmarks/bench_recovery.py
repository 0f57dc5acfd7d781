"""What recovery brings back of a pruned model, and at what cost: block by block, by adapters, end to end.

    python benchmarks/bench_recovery.py --corpus TEXT [--starts KEY,KEY] [--full KEY,KEY] [--write]

A start is the model with a fifth of its blocks' weights cut, by one of several methods. `recover-local` recovers each
on so many of the model's own samples (--sequences) and takes as long as it takes; on the starts of --full, `lora` and
`distill` then train on the same text for as many seconds as it took in all, what they do before the first step not
counted. Judged by `gossamer eval` with weights as floats and exact activations. A share is that of the log-perplexity
which the cut lost. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gossamer import settings
from gossamer.checkpoint import open_checkpoint
from gossamer.compress.calibration import Calibration, calibrate, token_hash
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import Recipe, parse_recipe
from gossamer.engine import LLM
from gossamer.measure.records import machine_block

PAGE = Path(__file__).parent.parent / "docs" / "results" / "recovery.md"
OF_CUT = 16
"""Sequences that decide what is cut: the same whatever is recovered on."""
STARTS: dict[str, dict[str, Any]] = {
    key: {"method": key, "ratio": 0.2, "sequences": OF_CUT} for key in ("wanda-sp", "flap", "depth", "llm-pruner")
}
MANY_STEPS = 4096
"""More than any budget of seconds allows."""
LIMIT_TOKENS, LIMIT_MINUTES, WANTED_SHARE = 1_000_000, 15, 0.5
Row = dict[str, Any]


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(settings.threads())
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    original = bench.judge(args.model)
    rows = [row for start in args.starts for row in bench.rows(start, original)]
    run = {
        "benchmark": "bench_recovery",
        "command": " ".join(["python benchmarks/bench_recovery.py", *map(shown, sys.argv[1:])]),
        "machine": machine_block(settings.threads()),
        "protocol": {"model": shown(args.model), "corpus": shown(args.corpus), "judged": args.judged}
        | {"sequences": args.sequences, "length": args.length, "local": args.local},
        "perplexity": original,
        "rows": rows,
    }
    text = page(run)
    print(text)
    if args.write:
        PAGE.write_text(text)
    print(json.dumps(run))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", required=True, help="text to judge on; nothing learns from it")
    parser.add_argument("--starts", type=keys_argument, default=["wanda-sp", "flap", "depth"])
    parser.add_argument("--full", type=keys_argument, default=["wanda-sp"], help="where lora and distill recover, too")
    parser.add_argument("--local", type=json.loads, default={}, help="options of recover-local, as JSON")
    parser.add_argument(
        "--sequences",
        type=counts_argument,
        default=[16, 64],
        help="of the model's own text to recover on: a round of rows for each number",
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--judged", type=int, default=10240, help="tokens of the corpus to judge on")
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    return parser.parse_args()


def keys_argument(text: str) -> list[str]:
    keys = text.split(",") if text else []
    for key in keys:
        if key not in STARTS:
            raise argparse.ArgumentTypeError(f"no start {key!r}: {', '.join(STARTS)}")
    return keys


def counts_argument(text: str) -> list[int]:
    counts = sorted(map(int, text.split(",")))
    if counts[0] < OF_CUT:
        raise argparse.ArgumentTypeError(f"{counts[0]} sequences: at least the {OF_CUT} that the cut is decided on")
    return counts


def shown(word: str) -> str:
    """An argument as the page has it: of a path, only its name."""
    return Path(word).name if "/" in word else word


class Bench:
    """The model, its calibration text, and what is made of both."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.checkpoint = args, open_checkpoint(args.model)
        recipe = self._recipe([STARTS["wanda-sp"]], args.sequences[-1])
        sample = lambda sequences, length, seed: LLM(self.checkpoint).sample_tokens(sequences, length, seed)  # noqa: E731
        self.calibration: Calibration = calibrate(recipe.calibration, self.checkpoint, sample)
        """The most of the model's own samples that a row takes, from the cache if they are there."""

    def rows(self, start: str, original: float) -> list[Row]:
        """The start as it was cut, and what each method makes of it with each amount of text."""
        pruned = self._made(start, "pruned", self.args.sequences[0])
        lost, rows = math.log(pruned["perplexity"] / original), list[Row]()
        for count in self.args.sequences:
            tokens = count * self.args.length // 2
            local = self._made(start, "recover-local", count, **{"tokens": tokens} | self.args.local)
            seconds = max(1.0, local["seconds"] - pruned["seconds"])
            rows.append(local | {"trained_seconds": seconds})
            if start in self.args.full:
                budget = {"tokens": None, "steps": MANY_STEPS, "patience": None, "seconds": seconds}
                for method in ("lora", "distill"):
                    rows.append(self._made(start, method, count, **budget) | {"trained_seconds": seconds})
        for row in rows:
            row["seconds"] -= pruned["seconds"]
            row["share"] = math.log(pruned["perplexity"] / row["perplexity"]) / lost
            row["share_per_minute"] = 60 * row["share"] / row["trained_seconds"]
        return [pruned, *rows]

    def _made(self, start: str, method: str, count: int, **options: Any) -> Row:
        """Make and judge the start with this method behind it, on so many sequences."""
        steps, stages = 0, [STARTS[start]]
        if method != "pruned":
            stages.append({"method": method, **options})

        def watch(label: str, done: int, total: int) -> None:
            nonlocal steps
            steps = done + 1 if label == "tuning" and done < total else steps
            print(f"\r{start}, {method}: {label} {done} of {total}    ", end="", file=sys.stderr, flush=True)

        out, began = self.args.work / f"{start}-{method}-{count}", time.monotonic()
        compress(
            self.checkpoint,
            self._recipe(stages, count),
            out,
            first(self.calibration, count),
            progress=watch,
            overwrite=True,
            restart=True,
        )
        row = {"start": start, "method": method, "sequences": count, "seconds": time.monotonic() - began}
        tokens = options.get("tokens") if options.get("tokens") is not None else steps * self.args.length
        row |= {"tokens": 0 if method == "pruned" else tokens, "perplexity": self.judge(str(out))}
        print(f"\r{json.dumps(row)}", file=sys.stderr, flush=True)
        return row

    def judge(self, model: str) -> float:
        """Perplexity on the corpus."""
        exact = ["--activations", "exact", "--backend", "reference", "--weights", "float", "--samples", "0"]
        command = [sys.executable, "-m", "gossamer", "eval", model, "--corpus", self.args.corpus]
        command += ["--tokens", str(self.args.judged), *exact, "--json", "-q"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout.splitlines()[-1])["results"]["perplexity"])

    def _recipe(self, stages: list[dict[str, Any]], count: int) -> Recipe:
        text = {"source": "self", "sequences": count, "length": self.args.length, "seed": 0}
        return parse_recipe({"version": 1, "name": "recovery", "calibration": text, "stages": stages}, "benchmark")


def first(calibration: Calibration, count: int) -> Calibration:
    """The first sequences of a calibration."""
    tokens = calibration.tokens[:count]
    return Calibration(tokens, calibration.record | {"sha256": token_hash(tokens), "sequences": count})


def page(run: dict[str, Any]) -> str:
    """Markdown: the one table, and how each column came about."""
    protocol, machine = run["protocol"], run["machine"]
    lines = [
        "# What recovery brings back",
        "",
        f"    {run['command']}",
        "",
        f"{machine['cpu']}, {settings.threads()} threads. Perplexity is that of {protocol['judged']:,} tokens of",
        f"{protocol['corpus']}, which nothing learned from: {run['perplexity']:.2f} for {protocol['model']},",
        "which comes as a Q4_1 GGUF file: it was **already 4-bit**. A fifth of its blocks' weights is cut; what is",
        f"left is recovered on sequences of {protocol['length']} tokens that the model wrote, and judged in float.",
        "",
        "*Share*: of the log-perplexity that the cut lost. *Trained*: tokens of all steps, at most; by",
        "`recover-local` each block's, behind least squares that read every sequence. *Seconds*: of the whole stage.",
        "`lora` and `distill` train as long as `recover-local` took in all; *a minute* counts their training alone.",
        "",
        "| start | recovered by | sequences | perplexity | share | trained | seconds | share a minute |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in run["rows"]:
        if row["method"] == "pruned":
            lines.append(f"| {row['start']} | - | - | {row['perplexity']:.2f} | - | - | - | - |")
            continue
        figures = f"{row['perplexity']:.2f} | {row['share']:.1%} | {row['tokens']:,} | {row['seconds']:.0f}"
        name = f"{row['start']} | {row['method']} | {row['sequences']}"
        lines.append(f"| {name} | {figures} | {row['share_per_minute']:.1%} |")
    return "\n".join([*lines, "", verdict(run), ""])


def verdict(run: dict[str, Any]) -> str:
    """Whether the goal was met, start by start."""
    said = []
    for local in (row for row in run["rows"] if row["method"] == "recover-local"):
        alike = [r for r in run["rows"] if (r["start"], r["sequences"]) == (local["start"], local["sequences"])]
        others = [r for r in alike if r["method"] in ("lora", "distill")]
        within = local["seconds"] <= 60 * LIMIT_MINUTES and local["tokens"] <= LIMIT_TOKENS
        half = "at least" if local["share"] >= WANTED_SHARE else "less than"
        text = f"- {local['start']}, {local['sequences']} sequences: {half} half came back" + (
            "" if within else ", but over the limits"
        )
        for other in others:
            more = "more" if local["share_per_minute"] > other["share_per_minute"] else "less"
            text += f"; {more} a minute than by {other['method']}"
        said.append(f"{text}.")
    goal = f"Wanted: half of it, with less than {LIMIT_TOKENS:,} tokens and {LIMIT_MINUTES} minutes."
    return "\n".join([goal, "", *said])


if __name__ == "__main__":
    sys.exit(main())
