"""What each weight format costs to multiply by: time a row and bytes moved, beside int4 and bf16, taken in turns.

    python benchmarks/micro_formats.py [--rows N] [--columns N] [--tokens 1,8,64] [--threads N] [--rounds N]

A product walks over copies of a weight that no cache holds, as decoding does. The formats take turns, round by round,
so that a machine that drifts drifts for all alike; rates are medians. `expand` is what a format costs that no kernel
multiplies, if it is made floats at every call instead of when it is loaded: dequantize in torch, then the bf16 product.
Its `ratio` is to the same format's kernel, or to bf16 for k-means, which has none and is held in bfloat16.
The last line of the output is one JSON object. Knows no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gossamer.formats import Codebook, Format, Integer, KMeans
from gossamer.kernels import cpu, dispatch
from gossamer.settings import threads as default_threads

COLD_BYTES = 96 << 20
OUTLIER_SHARE = 0.0045
"""Of the weights that k-means keeps beside its levels, as its paper does."""
Pack = Callable[[Any, torch.Generator], Any]
"""Arena and generator -> a packed weight."""


@dataclass(frozen=True)
class Row:
    """One format at one number of tokens."""

    format: str
    tokens: int
    ns_per_row: float
    bytes_per_row: float
    gbytes: float
    to_int4: float
    """Its time over that of int4-g64."""
    to_bf16: float


class Weights:
    """Random weights [rows, columns] in every format that a kernel multiplies."""

    def __init__(self, rows: int, columns: int, threads: int) -> None:
        self.rows, self.columns, self.threads = rows, columns, threads
        self.ext: Any = cpu.extension()

    def formats(self) -> dict[str, Pack]:
        """Name -> how it is packed."""
        found: dict[str, Pack] = {f"int{b}-g64": self._integer(b) for b in (2, 3, 4, 5, 6, 8)}
        found |= {
            "bf16": self._bf16, "fp8": self._fp8, "mxfp4": self._codebook("mxfp4", 32),
            "nvfp4": self._codebook("nvfp4", 16), "nf4-g64": self._codebook("nf4", 64),
            "fp4-g64": self._codebook("fp4", 64), "int4-g64-outliers": self._with_outliers,
        }  # fmt: skip
        return found

    def _words(self, bits: int, generator: torch.Generator) -> np.ndarray:
        words = torch.randint(
            -(2**31), 2**31, (self.rows, cpu.words(self.columns, bits)), generator=generator, dtype=torch.int64
        )
        return words.to(torch.int32).numpy()

    def _scale(self, group_size: int, generator: torch.Generator, dtype: torch.dtype) -> np.ndarray:
        scale = torch.rand(self.rows, self.columns // group_size, generator=generator) + 0.5
        return (2.0 ** scale.log2().round() if dtype == torch.uint8 else scale.to(dtype).float()).numpy()

    def _integer(self, bits: int) -> Pack:
        def pack(arena: Any, generator: torch.Generator) -> Any:
            scale = self._scale(64, generator, torch.bfloat16)
            part = self.ext.IntegerPart(self._words(bits, generator), scale, None, bits)
            return self.ext.pack_integer(arena, [part], self.columns, False, self.threads)

        return pack

    def _codebook(self, kind: Any, group_size: int) -> Pack:
        dtype = {"mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}.get(kind, torch.bfloat16)
        levels = Codebook(kind, group_size).levels.numpy()

        def pack(arena: Any, generator: torch.Generator) -> Any:
            part = self.ext.IntegerPart(self._words(4, generator), self._scale(group_size, generator, dtype), None, 4)
            return self.ext.pack_codebook(arena, [part], [None], levels, self.columns, False, self.threads)

        return pack

    def _bf16(self, arena: Any, generator: torch.Generator) -> Any:
        weight = torch.randn(self.rows, self.columns, generator=generator).bfloat16().view(torch.int16).numpy()
        return self.ext.pack_bf16(arena, [weight.view(np.uint16)], False, self.threads)

    def _fp8(self, arena: Any, generator: torch.Generator) -> Any:
        weight = (torch.randn(self.rows, self.columns, generator=generator) * 90).to(torch.float8_e4m3fn)
        scale = np.full(self.rows, 0.01, np.float32)
        return self.ext.pack_e4m3(arena, [weight.view(torch.uint8).numpy()], [scale], False, self.threads)

    def _with_outliers(self, arena: Any, generator: torch.Generator) -> Any:
        weight = self._integer(4)(arena, generator)
        places = (torch.rand(self.rows, self.columns, generator=generator) < OUTLIER_SHARE).nonzero().int()
        weight.keep(places[:, 0].numpy().copy(), places[:, 1].numpy().copy(), np.ones(len(places), np.float32))
        return weight


class Walk:
    """Products of some tokens with copies of a weight, one copy after another, so that no cache holds the next."""

    def __init__(self, weights: Weights, pack: Pack, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.arena = weights.ext.Arena()
        self.copies = [pack(self.arena, generator)]
        while len(self.copies) * self.copies[0].nbytes < COLD_BYTES:
            self.copies.append(pack(self.arena, generator))
        self.threads, self.turn = weights.threads, 0

    def seconds(self, x: np.ndarray, y: np.ndarray, calls: int) -> float:
        """Mean of some calls, each with the next copy."""
        began = time.perf_counter()
        for _ in range(calls):
            self.copies[self.turn].linear(x, False, self.threads, y)
            self.turn = (self.turn + 1) % len(self.copies)
        return (time.perf_counter() - began) / calls


def main() -> None:
    """Measure, print two tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--tokens", default="1,8,64")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", choices=cpu.isas(), default=cpu.isa())
    args = parser.parse_args()
    cpu.use_isa(args.isa)
    torch.set_num_threads(args.threads)
    weights = Weights(args.rows, args.columns, args.threads)
    print(f"isa {args.isa}, threads {args.threads}, weight {args.rows}x{args.columns}, out of the cache")
    walks = {name: Walk(weights, pack, n) for n, (name, pack) in enumerate(weights.formats().items())}
    rows = [row for tokens in map(int, args.tokens.split(",")) for row in measure(weights, walks, tokens, args.rounds)]
    expanded = expansion(weights, {row.format: row.ns_per_row for row in rows if row.tokens == 1}, args.rounds)
    result = {
        "benchmark": "micro_formats",
        "isa": args.isa,
        "threads": args.threads,
        "weight": [args.rows, args.columns],
        "products": [_rounded(asdict(row)) for row in rows],
        "expanded": expanded,
    }
    print(json.dumps(result))


def measure(weights: Weights, walks: dict[str, Walk], tokens: int, rounds: int) -> list[Row]:
    """A line for each format, from rounds in which all of them take turns."""
    x = np.random.default_rng(0).standard_normal((tokens, weights.columns), np.float32)
    y = np.empty((tokens, weights.rows), np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in walks}
    for turn in range(rounds + 1):
        for name, walk in walks.items():
            taken = walk.seconds(x, y, calls=max(2, 24 // tokens))
            if turn:  # the first is to warm up
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{tokens} tokens{'ns/row':>23} {'bytes/row':>10} {'GB/s':>7} {'/ int4':>7} {'/ bf16':>7}")
    rows = []
    for name, taken in median.items():
        size = walks[name].copies[0].nbytes
        row = Row(
            name, tokens, taken / weights.rows * 1e9, size / weights.rows, size / taken / 1e9,
            taken / median["int4-g64"], taken / median["bf16"],
        )  # fmt: skip
        rows.append(row)
        print(
            f"{name:>20} {row.ns_per_row:10.1f} {row.bytes_per_row:10.1f} {row.gbytes:7.2f} {row.to_int4:7.2f} "
            f"{row.to_bf16:7.2f}"
        )
    return rows


def expansion(weights: Weights, kernel_ns: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    """Time a row of making a format floats at every call, and the product after it, against what is done instead."""
    forms: dict[str, Format] = {
        "int4-g64": Integer(4, 64), "mxfp4": Codebook("mxfp4", 32), "nvfp4": Codebook("nvfp4", 16),
        "nf4-g64": Codebook("nf4", 64), "fp8": Codebook("fp8", None), "kmeans4": KMeans(4),
    }  # fmt: skip
    weight = torch.randn(weights.rows, weights.columns, generator=torch.Generator().manual_seed(0))
    print(f"\n1 token, made floats at every call{'ns/row':>10} {'ratio':>7}")
    found = []
    for name, form in forms.items():
        tensors = _stored(form, weight)
        x = torch.randn(1, weights.columns)

        def call(form: Format = form, tensors: dict[str, torch.Tensor] = tensors, x: torch.Tensor = x) -> None:
            dispatch.linear_dense(x, form.unpack(tensors).bfloat16())

        call()
        times = []
        for _ in range(max(3, rounds // 3)):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        ns = statistics.median(times) / weights.rows * 1e9
        ratio = ns / kernel_ns["bf16" if name == "kmeans4" else name]
        found.append(_rounded({"format": name, "ns_per_row": ns, "ratio": ratio}))
        print(f"{name:>34} {ns:10.1f} {ratio:7.1f}")
    return found


def _stored(form: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Stored tensors of a weight rounded to a format."""
    out, columns = weight.shape
    if isinstance(form, KMeans):
        from gossamer.formats import Codes

        index = torch.randint(0, 2**form.bits, (out, columns), generator=torch.Generator().manual_seed(1))
        levels = torch.randn(out, 2**form.bits).half().float()
        return form.pack(Codes(index.to(torch.int8), torch.ones(out, 1), None, levels))
    grouped = weight.view(out, form.groups(columns), -1)
    scale, zero = form.fit(grouped.amin(-1), grouped.amax(-1))
    codes = form.round(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1)).view(out, columns)
    return form.pack(form.assemble(codes, scale, zero))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


if __name__ == "__main__":
    main()
