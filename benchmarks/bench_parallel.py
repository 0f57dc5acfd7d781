"""Two ranks of one thread beside one process of two threads, in turns; and the price of a sum over the ranks.

    python benchmarks/bench_parallel.py [MODEL] [--batch 16]

Ends in one JSON line. The machine should have nothing else to do: ranks wait for each other in every layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

WORDS = 16 * 576
SUM = """
import sys, time
import numpy as np
from gossamer.kernels import cpu
add = cpu.extension().SharedSum(int(sys.argv[1]), int(sys.argv[2]), 2, 60.0)
data = np.ones(int(sys.argv[3]), np.float32)
for _ in range(200): add(data); data.fill(1)
taken = []
for _ in range(2000):
    began = time.perf_counter(); add(data); taken.append(time.perf_counter() - began); data.fill(1)
taken.sort()
print(taken[len(taken) // 2] * 1e6, taken[len(taken) * 9 // 10] * 1e6)
"""


def sum_price() -> dict[str, float]:
    """Microseconds of a sum of one step's hidden states over two processes."""
    from gossamer.kernels import cpu

    memory = os.memfd_create("bench")
    os.ftruncate(memory, cpu.extension().SharedSum.bytes(2))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SUM, str(memory), str(rank), str(WORDS)],
            pass_fds=[memory], stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    found = [rank.communicate(timeout=300)[0].split() for rank in ranks]
    return {"median_us": float(found[0][0]), "p90_us": float(found[0][1]), "floats": WORDS}


def decode_seconds(backend, batch: int, steps: int) -> list[float]:
    """Seconds of each step that gives every one of `batch` sequences a token."""
    from gossamer.engine.runner import KVPool, Rows

    pool = KVPool(backend)
    prompts = [[(7 * i + j) % 1000 + 20 for j in range(64)] for i in range(batch)]
    taken = []
    with Rows(pool, prompts, [64 + steps + 2] * batch) as rows:
        for _ in range(steps + 1):
            began = time.perf_counter()
            tokens = rows.argmax().tolist()
            taken.append(time.perf_counter() - began)
            rows.append(tokens)
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    os.environ["GOSSAMER_THREADS"] = "2"
    from gossamer.checkpoint import open_checkpoint
    from gossamer.engine.backend import choose

    checkpoint = open_checkpoint(asked.model)
    backends = {
        "one process, 2 threads": choose(checkpoint, "cpu"),
        "tp 2, 1 thread each": choose(checkpoint, "cpu", tp=2),
    }
    medians: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(asked.turns):
        for name, backend in backends.items():
            medians[name].append(statistics.median(decode_seconds(backend, asked.batch, asked.steps)))
    rates = {name: asked.batch / statistics.median(taken) for name, taken in medians.items()}
    one, two = rates.values()
    record = {
        "model": asked.model,
        "batch": asked.batch,
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(two / one, 3),
        "ratio_of_each_turn": [round(a / b, 3) for a, b in zip(*medians.values(), strict=True)],
        "sum": sum_price(),
        "load_average": os.getloadavg(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
