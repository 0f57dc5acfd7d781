"""GPTQ of SmolLM2, Gossamer against llmcompressor: the same tokens and settings, in turn, then both judged.

    python benchmarks/gptq_vs_llmcompressor.py --corpus TEXT [--rounds 3] [--bits 4]

Whole processes are timed (start, load, compress, save); llmcompressor's own seconds inside are printed beside them.
Judged by KL divergence to the float model on --corpus, by our own `gossamer eval`. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gossamer.compress.pipeline import CALIBRATION_FILE
from peers import python_of

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/gptq"))
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", default="60000", help="tokens of the corpus to judge on")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    base, ours, theirs = work / "smollm2", work / f"ours-{args.bits}", work / f"llmcompressor-{args.bits}"
    if not base.exists():
        run([sys.executable, "-m", "gossamer", "convert", "smollm2", "--out", base])
    mine = [sys.executable, "-m", "gossamer", "compress", base, "--recipe", f"int{args.bits}-gptq", "--out", ours, "-q"]
    run([*mine, "--overwrite"])  # samples the calibration text, which both then share
    tokens = work / CALIBRATION_FILE
    shutil.copy(ours / CALIBRATION_FILE, tokens)
    peer = [python_of("llmcompressor"), HERE / "llmcompressor_gptq.py", base, tokens, theirs, args.bits, 64]
    seconds: dict[str, list[float]] = {"gossamer": [], "llmcompressor": [], "llmcompressor inside": []}
    for _ in range(args.rounds):
        seconds["gossamer"].append(run([*mine, "--overwrite"])[0])
        shutil.rmtree(theirs, ignore_errors=True)
        total, text = run(peer)
        seconds["llmcompressor"].append(total)
        seconds["llmcompressor inside"].append(float(text.split()[-1]))
    for name, values in seconds.items():
        print(f"{name}: median {statistics.median(values):.1f} s of {[round(v, 1) for v in values]}")
    ratio = statistics.median(a / b for a, b in zip(seconds["gossamer"], seconds["llmcompressor inside"], strict=True))
    print(f"time ratio gossamer / llmcompressor inside (median of pairs): {ratio:.2f}")
    judge = [
        "eval",
        ours,
        theirs,
        "--reference",
        base,
        "--corpus",
        args.corpus,
        "--tokens",
        args.tokens,
        "--samples",
        "0",
    ]
    _, lines = run([sys.executable, "-m", "gossamer", *judge, "--json", "-q"])
    results = {Path(r["model"]["path"]).name: r["results"] for r in map(json.loads, lines.splitlines())}
    for name, r in results.items():
        print(f"{name}: KL divergence {r['kld_mean']:.4f}, perplexity {r['perplexity']:.3f}")
    print(json.dumps({"benchmark": "gptq_vs_llmcompressor", "seconds": seconds, "ratio": ratio, "quality": results}))
    return 0


def run(words: list[object]) -> tuple[float, str]:
    """Seconds and standard output of a command; leaves if it fails."""
    started = time.monotonic()
    done = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{words} failed with {done.returncode}")
    return time.monotonic() - started, done.stdout


if __name__ == "__main__":
    sys.exit(main())
