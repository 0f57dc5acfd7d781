"""Does a smaller model decode as fast as its size promises?

    python benchmarks/bench_smaller.py [--rounds N] [--only KEY,KEY] [--write]

SmolLM2 cut by each family, beside the same in full: structured pruning (layers of unlike shapes), sparsity, low rank.
Both are made by `gossamer compress` below the cache and take turns. The promise is the ratio of the bytes that a token
reads; what was measured is the median of the pairs' ratios of time. Of speed only: the cuts are by little data, and
nothing is recovered. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import cpu_models
from cpu_rows import DECODE
from engine_worker import seconds_of
from gossamer.checkpoint import open_checkpoint
from gossamer.engine.backend import Backend, choose
from gossamer.measure.records import machine_block
from gossamer.settings import cache_dir, threads

PAGE = Path(__file__).parent.parent / "docs" / "results" / "smaller.md"
REQUEST = replace(DECODE, output=64)
TEXT = {"source": "self", "sequences": 8, "length": 256, "seed": 0}
Stage = dict[str, Any]

HEAD: Stage = {"bits": 8, "group_size": "channel"}
INT8: Stage = {"method": "rtn", "bits": 8, "group_size": "channel", "embedding": HEAD}
INT4: Stage = {"method": "rtn", "bits": 4, "group_size": 32, "embedding": HEAD}


def flap(ratio: float) -> Stage:
    return {"method": "flap", "ratio": ratio}


@dataclass(frozen=True)
class Row:
    """One comparison: stages that leave the size, and those that make it smaller before them."""

    key: str
    title: str
    smaller: tuple[Stage, ...]
    same: tuple[Stage, ...] = ()
    wanted: float | None = None
    """The ratio of times that is a pass."""
    base: str = "bf16"
    """What is made smaller: a key of `cpu_models`."""


ROWS = (
    Row("pruned-20", "20% of the blocks pruned, bf16", (flap(0.2),), wanted=1.13),
    Row("pruned-50", "50% of the blocks pruned, bf16", (flap(0.5),), wanted=1.45),
    Row("pruned-20-int8", "20% pruned, 8 bits", (flap(0.2),), (INT8,)),
    Row("pruned-50-int8", "50% pruned, 8 bits", (flap(0.5),), (INT8,)),
    Row("pruned-20-int4", "20% pruned, 4 bits", (flap(0.2),), (INT4,)),
    Row("pruned-50-int4", "50% pruned, 4 bits", (flap(0.5),), (INT4,)),
    Row("sparse-int8", "half of the weights zero, 8 bits", ({"method": "magnitude"},), (INT8,), wanted=1.4),
    Row("low-rank-80", "factors of 80% of the parameters, bf16", ({"method": "svd", "ratio": 0.8},)),
    Row("low-rank-50", "factors of 50% of the parameters, bf16", ({"method": "svd", "ratio": 0.5},)),
    Row("low-rank-50-1b", "the same of 1.2 billion, bf16", ({"method": "svd", "ratio": 0.5},), base="1b-bf16"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[row.key for row in ROWS])
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    args = parser.parse_args()
    results = [measured(row, args.rounds) for row in ROWS if row.key in args.only]
    text = page(results, args.rounds)
    print(text)
    if args.write:
        PAGE.write_text(text)
    print(json.dumps({"benchmark": "bench_smaller", "machine": machine_block(threads()), "rows": results}))
    return 0


def measured(row: Row, rounds: int) -> dict[str, Any]:
    """Both models of a row in turns, behind a pair that does not count."""
    full, smaller = (
        choose(open_checkpoint(made(row.base, stages))) for stages in (row.same, (*row.smaller, *row.same))
    )
    pairs = [tuple(seconds_of(backend, 49152, REQUEST) for backend in (full, smaller)) for _ in range(rounds + 1)][1:]
    promise, gain = read(full) / read(smaller), statistics.median(a / b for a, b in pairs)
    print(f"{row.key}: promised {promise:.2f}, is {gain:.2f}", file=sys.stderr, flush=True)
    sizes = [read(backend) for backend in (full, smaller)]
    return {"key": row.key, "title": row.title, "wanted": row.wanted, "bytes": sizes, "promise": promise} | {
        "gain": gain,
        "tokens_per_s": [REQUEST.output / statistics.median(times) for times in zip(*pairs, strict=True)],
        "seconds": pairs,
    }


def made(key: str, stages: tuple[Stage, ...]) -> Path:
    """A model of `cpu_models` with these stages, made when it is first asked for."""
    base = cpu_models.path_of(key)
    if not stages:
        return base
    recipe = yaml.safe_dump({"version": 1, "name": "smaller", "calibration": TEXT, "stages": list(stages)})
    kind = "" if key == "bf16" else f"{key}-"
    folder = cache_dir("bench") / f"smaller-{kind}{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if not folder.exists():
        file = folder.with_suffix(".yaml")
        file.write_text(recipe)
        command = [sys.executable, "-m", "gossamer", "compress", str(base), "--recipe", str(file), "--out", str(folder)]
        subprocess.run([*command, "--quiet"], check=True)
    return folder


def read(backend: Backend) -> int:
    """Bytes of weights that a token reads, as they lie in memory."""
    return int(backend.weight_bytes)


def page(results: list[dict[str, Any]], rounds: int) -> str:
    command, cpu = " ".join(["python benchmarks/bench_smaller.py", *sys.argv[1:]]), machine_block(threads())["cpu"]
    lines = [
        "# Smaller models, decoded",
        "",
        f"    {command}",
        "",
        f"{cpu}, {threads()} threads; one sequence, {REQUEST.output} tokens, {rounds} pairs",
        "in turns. The promise is the ratio of the bytes that a token reads, embedding as head included; measured is",
        "the median of the pairs' ratios of time. SmolLM2-135M-Instruct was already 4-bit (a Q4_1 GGUF file) before",
        "any of these was made; what has 1.2 billion parameters has random ones. Of speed only: what such cuts cost",
        "stands in [pruning.md](pruning.md). Zeros among 8-bit weights stay out of memory where an instruction expands",
        "bytes (AVX-512 with VBMI2): less is read, which pays where memory takes longer to bring whole weights than",
        "the instruction takes to fill up a register. Byte shuffles (AVX2) take longer still: there zeros are filled",
        "in at load, and cost what other weights cost. A layer in factors is two products, each with a wait for all",
        "threads behind it: small layers keep less of their promise than large ones.",
        "",
        "| model | MB full | MB smaller | tokens/s full | tokens/s smaller | promised | measured | wanted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results:
        sizes = " | ".join(f"{size / 1e6:.1f}" for size in row["bytes"])
        speeds = " | ".join(f"{speed:.0f}" for speed in row["tokens_per_s"])
        wanted = "-" if row["wanted"] is None else f"{row['wanted']:.2f}"
        lines.append(f"| {row['title']} | {sizes} | {speeds} | {row['promise']:.2f} | {row['gain']:.2f} | {wanted} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
