"""What recovery brings back of a pruned model, and at what cost: block by block, by adapters, end to end.

    python benchmarks/bench_recovery.py --corpus TEXT [--prune '{"method": "flap", "ratio": 0.2}'] [--tokens 131072]

The model is pruned once; then each method recovers it on the model's own samples. `recover-local` takes as long as its
tokens ask for; the others get as many seconds of training as it took in all. Judged by `gossamer eval` with weights as
floats and exact activations. A share is that of the log-perplexity which pruning lost. Ends with one JSON line.
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
from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.compress.calibration import Calibration, calibrate
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import Recipe, parse_recipe
from gossamer.engine import LLM

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--prune", type=json.loads, default={"method": "flap", "ratio": 0.2})
    parser.add_argument("--tokens", type=int, default=131_072, help="that recover-local trains each block on")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--judged", default="10240", help="tokens of the corpus to judge on")
    args = parser.parse_args()
    torch.set_num_threads(settings.threads())
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    pruned = bench.row("pruned")
    local = bench.row("recover-local", {"method": "recover-local", "tokens": args.tokens})
    seconds = max(1.0, local["seconds"] - pruned["seconds"])
    rows = [pruned, local]
    for method in ("lora", "distill"):
        rows.append(bench.row(method, {"method": method, "tokens": None, "patience": None, "seconds": seconds}))
    original = bench.judge(args.model)
    for row in rows:
        row["seconds"] = round(row["seconds"] - (pruned["seconds"] if row is not pruned else 0), 1)
        lost = math.log(pruned["perplexity"] / original)
        row["share"] = math.log(pruned["perplexity"] / row["perplexity"]) / lost
    print(table(args.model, original, rows))
    print(json.dumps({"model": args.model, "prune": args.prune, "perplexity": original, "rows": rows}))
    return 0


class Bench:
    """The model, its calibration text, and what is made of both."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.checkpoint = args, open_checkpoint(args.model)
        self.calibration = calibration(self.checkpoint, self._recipe([]))

    def row(self, name: str, *stages: dict[str, Any]) -> Row:
        """Make and judge the pruned model with these stages after the first."""
        steps = 0

        def watch(label: str, done: int, total: int) -> None:
            nonlocal steps
            steps = done if label == "tuning" and done < total else steps
            print(f"\r{name}: {label} {done} of {total}    ", end="", file=sys.stderr)

        out, began, cpu = self.args.work / name, time.monotonic(), time.process_time()
        compress(
            self.checkpoint,
            self._recipe(list(stages)),
            out,
            self.calibration,
            progress=watch,
            overwrite=True,
            restart=True,
        )
        took = {"seconds": time.monotonic() - began, "cpu_seconds": round(time.process_time() - cpu, 1)}
        tokens = stages[0].get("tokens") if stages else 0
        trained = (steps + 1) * self.args.length if tokens is None else tokens
        return {"name": name, "tokens": trained, **took, "perplexity": self.judge(str(out))}

    def judge(self, model: str) -> float:
        """Perplexity on the corpus."""
        exact = ["--activations", "exact", "--backend", "reference", "--weights", "float", "--samples", "0"]
        command = [sys.executable, "-m", "gossamer", "eval", model, "--corpus", self.args.corpus]
        command += ["--tokens", self.args.judged, *exact, "--json", "-q"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout.splitlines()[-1])["results"]["perplexity"])

    def _recipe(self, stages: list[dict[str, Any]]) -> Recipe:
        text = {"source": "self", "sequences": self.args.sequences, "length": self.args.length, "seed": 0}
        whole = {"version": 1, "name": "recovery", "calibration": text, "stages": [self.args.prune, *stages]}
        return parse_recipe(whole, "benchmark")


def calibration(checkpoint: Checkpoint, recipe: Recipe) -> Calibration:
    """The model's own samples, from the cache if they are there."""
    sample = lambda sequences, length, seed: LLM(checkpoint).sample_tokens(sequences, length, seed)  # noqa: E731
    return calibrate(recipe.calibration, checkpoint, sample)


def table(model: str, original: float, rows: list[Row]) -> str:
    """Markdown; recover-local ends a block early where nothing is gained, so its tokens are an upper bound."""
    lines = [
        f"{model}: perplexity {original:.3f}",
        "",
        "| | perplexity | share of lost log-perplexity | tokens | seconds | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = (
            f"{row['perplexity']:.3f} | {row['share']:.1%} | {row['tokens']} | {row['seconds']} | {row['cpu_seconds']}"
        )
        lines.append(f"| {row['name']} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
