"""Where the time of an engine step goes, and how far each row of the CPU benchmark could go at most.

    python benchmarks/phases.py MODEL [MODEL ...] [--rounds N]

For each model (a folder of integer weights) and each request of the CPU benchmark: tokens/s, the share of every phase,
the rate of all matrix products against what the same threads do on registers alone, and the ceiling: the tokens/s of a
step whose products run at that peak or whose weights come at the read bandwidth, whichever takes longer, whose keys and
values come at the read bandwidth, and that does nothing else. Medians; the limits are the best that was seen. The last
line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from cpu_rows import BATCH_16, BATCH_64, DECODE, DEEP, PREFILL
from engine_worker import Sequences
from gossamer.engine import LLM
from gossamer.settings import threads
from micro_engine import Bench
from worker_loop import Request, prompts

PRODUCTS = ("qkv", "output", "gate_up", "down", "head")
REQUESTS = {
    "decode 1": DECODE, "decode 1 at 1024": DEEP, "decode 16": BATCH_16, "decode 64": BATCH_64, "prefill 512": PREFILL,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    limits = Bench(threads(), 0.2)
    found: list[dict[str, Any]] = []
    print("| model | step | tokens/s | products GMAC/s | of peak | products | attention | rest | ceiling | reached |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for path in args.models:
        llm = LLM(path)
        for name, request in REQUESTS.items():
            rows = [measure(llm, request, limits) for _ in range(args.rounds)]
            row = {key: statistics.median(r[key] for r in rows) for key in rows[0]}
            found.append({"model": Path(path).name, "step": name, **{k: round(v, 3) for k, v in row.items()}})
            print(
                f"| {Path(path).name} | {name} | {row['rate']:,.0f} | {row['gmacs']:.0f} | {row['peak_share']:.0%}"
                f" | {row['products']:.0%} | {row['attention']:.0%} | {row['rest']:.0%} | {row['ceiling']:,.0f}"
                f" | {row['rate'] / row['ceiling']:.0%} |"
            )
    peak, read = max(limits.peaks["integer"]), max(limits.bandwidths)
    print(f"\npeak of byte products {peak:.0f} GMAC/s on {threads()} threads, best read bandwidth {read:.1f} GB/s")
    print(
        json.dumps({"benchmark": "phases", "peak_gmacs": round(peak, 1), "read_gbytes": round(read, 2), "rows": found})
    )


def measure(llm: LLM, request: Request, limits: Bench) -> dict[str, float]:
    """One timing of a request's steps, its phases, and the limits just before it."""
    peak, bandwidth = limits.peak(True), limits.bandwidth()
    backend = llm.backend
    model = backend._model  # type: ignore[attr-defined]  # phases are for benchmarks alone
    sequences = Sequences(backend, request.batch, request.context + request.output + 1)
    tokens = np.array(prompts(request, llm.config.vocab_size), np.int32)
    steps = request.output or 1
    if request.op == "prefill":
        warm = Sequences(backend, request.batch, request.context + 1)
        warm.prefill(tokens)
        model.phase_seconds()
        started = time.perf_counter()
        sequences.prefill(tokens)
        new, context = request.prompt, request.prompt / 2
    else:
        likeliest = sequences.decode(sequences.prefill(tokens), 4)
        model.phase_seconds()
        started = time.perf_counter()
        sequences.decode(likeliest, steps - 4)
        steps -= 4
        new, context = 1, sequences.length - steps / 2
    seconds = (time.perf_counter() - started) / steps
    phases = {name: total / steps for name, total in model.phase_seconds().items()}
    body, head = weights(llm)
    macs = request.batch * (new * body + head)
    products = sum(phases[name] for name in PRODUCTS)
    kv_bytes = backend.kv_bytes_per_token * context * request.batch * (1 if request.op == "decode" else 2)
    floor = max(macs / (peak * 1e9), backend.weight_bytes / (bandwidth * 1e9)) + kv_bytes / (bandwidth * 1e9)
    total = sum(phases.values())
    return {
        "rate": request.batch * new / seconds,
        "gmacs": macs / products / 1e9,
        "peak_share": macs / products / 1e9 / peak,
        "products": products / total,
        "attention": phases["attention"] / total,
        "rest": 1 - (products + phases["attention"]) / total,
        "ceiling": request.batch * new / floor,
    }


def weights(llm: LLM) -> tuple[int, int]:
    """Weights that every token of a step meets, and those of the head, which only results do."""
    config = llm.config
    body = sum(
        config.hidden_size * layer.head_dim * (2 * layer.num_heads + 2 * layer.num_kv_heads)
        + 3 * config.hidden_size * layer.ffn_width
        for layer in config.layers
    )
    return body, config.hidden_size * config.vocab_size


if __name__ == "__main__":
    main()
