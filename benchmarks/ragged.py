"""Does a model whose layers were cut run as fast as its smaller size promises?

    python benchmarks/ragged.py [--rounds N]

Two models with random 4-bit weights: SmolLM2's shape, and the same with other head counts and FFN widths in every
layer, as structured pruning leaves them. They take turns; decoding should gain what the bytes of a token say, prefill
what its multiplications say. Promise and gain are ratios of times, whole over cut. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_random_llama
from cpu_rows import DECODE, PREFILL
from engine_worker import seconds_of
from gossamer.checkpoint import open_checkpoint
from gossamer.engine.backend import Backend, choose
from gossamer.settings import cache_dir

LAYERS = 30
CUTS = [(9, 3, 1536), (6, 2, 1024), (4, 2, 704), (3, 1, 1088), (6, 3, 512)]
"""Query heads, key-value heads and FFN width of the cut model's layers, in turns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    whole, cut = (choose(open_checkpoint(model(name))) for name in ("whole", "cut"))
    found = {}
    for what, request, promise in (
        ("decode", replace(DECODE, output=64), read(whole) / read(cut)),
        ("prefill", PREFILL, multiplied(whole) / multiplied(cut)),
    ):
        pairs = [(seconds_of(whole, 49152, request), seconds_of(cut, 49152, request)) for _ in range(rounds)]
        gain = statistics.median(a / b for a, b in pairs)
        found[what] = {"promise": promise, "gain": gain, "share": gain / promise, "seconds": pairs}
        print(f"{what:8} promised {promise:.2f} times as fast, is {gain:.2f}: {gain / promise:.0%}", flush=True)
    print(json.dumps(found))


def model(name: str) -> Path:
    """Folder of one of the two models, made when it is first asked for."""
    folder = cache_dir("bench") / f"ragged-{name}"
    if not folder.exists():
        dense = cache_dir("bench") / f"ragged-{name}-bf16"
        make_random_llama.make(
            Namespace(out=dense, hidden=576, layers=LAYERS, heads=9, kv_heads=3, ffn=1536, vocab=49152),
            **({"gossamer_layers": [row(*CUTS[i % len(CUTS)]) for i in range(LAYERS)]} if name == "cut" else {}),
        )
        recipe = str(Path(__file__).parent / "recipes" / "bench-int4-rtn.yaml")
        command = [sys.executable, "-m", "gossamer", "compress", str(dense), "--recipe", recipe, "--out", str(folder)]
        subprocess.run(command, check=True)
    return folder


def row(num_heads: int, num_kv_heads: int, ffn_width: int) -> dict[str, Any]:
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "ffn_width": ffn_width}


def read(backend: Backend) -> int:
    """Bytes of weights that a token reads."""
    return backend.weight_bytes


def multiplied(backend: Backend) -> int:
    """Products of weights that a prompt's token takes; the head counts for one token only."""
    config = backend.config
    return sum(r * c for layer in config.layers for r, c in layer.linear_shapes(config.hidden_size).values())


if __name__ == "__main__":
    main()
