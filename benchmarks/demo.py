"""The main job, end to end: compress SmolLM2 by several recipes, measure each, print the table, draw the picture.

    python benchmarks/demo.py [--out runs/demo]

Every step is a `gossamer` command that is printed before it runs, so that any of them can be repeated by hand. What is
there already (models, measurements of the very same bytes) is not made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

RECIPES = ("int8-rtn", "int4-rtn", "int4-gptq", "int3-gptq")
EVAL = ("--tokens", "10240", "--samples", "3")
BENCH = ("--prompt-tokens", "256", "--output-tokens", "48", "--repetitions", "3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    try:
        run(parser.parse_args().out)
    except KeyboardInterrupt:
        return 130  # what was finished is there, and is not made again
    return 0


def run(out: Path) -> None:
    """Every step into this folder."""
    started = time.monotonic()
    baseline, results = out / "smollm2", out / "results.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if not baseline.exists():
        gossamer("convert", "smollm2", "--out", baseline)
    models = [baseline]
    for recipe in RECIPES:
        models.append(out / recipe)
        gossamer("compress", baseline, "--recipe", recipe, "--out", out / recipe, "--record", results)
    missing = {kind: [m for m in models if not measured(results, kind, m)] for kind in ("eval", "bench")}
    if missing["eval"]:
        gossamer("eval", *missing["eval"], "--reference", baseline, "--out", results, *EVAL)
    if missing["bench"]:
        gossamer("bench", *models, "--out", results, *BENCH)  # all of them, so that one run compares them
    report = out / "report.html"
    gossamer(
        "report",
        results,
        "--html",
        report,
        "--markdown",
        out / "table.md",
        "--title",
        "SmolLM2-135M, smaller by several recipes",
    )
    print(f"\n{time.monotonic() - started:.0f} s; open {report} in a browser", file=sys.stderr)


def gossamer(*arguments: object) -> None:
    """Run one command of the package that this Python has; leave with its exit code if it fails."""
    words = [str(a) for a in arguments]
    print(f"\n$ gossamer {shlex.join(words)}", file=sys.stderr, flush=True)
    code = subprocess.run([sys.executable, "-m", "gossamer", *words], check=False).returncode
    if code:
        sys.exit(code)


def measured(results: Path, kind: str, model: Path) -> bool:
    """True if the results hold a good record of this kind for the model's present bytes."""
    from gossamer.checkpoint import open_checkpoint

    if not results.exists():
        return False
    fingerprint = open_checkpoint(model).fingerprint()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return any(r["kind"] == kind and r["status"] == "ok" and r["model"]["fingerprint"] == fingerprint for r in rows)


if __name__ == "__main__":
    sys.exit(main())
