"""How fast each kernel of the engine is, and how far from what the machine can do.

    python benchmarks/micro_engine.py [--isa NAME] [--threads N] [--seconds S]

"hot" multiplies one weight that stays in the cache, for several numbers of tokens; its share is of the products that
the same threads do on registers alone, measured just before. What a call spends besides on making activations ready
(one thread does that here, unlike in the engine) is measured with a weight of one tile and taken off. "cold" walks over
copies of a weight that no cache holds, for one token, as decoding does; its share is of the read bandwidth measured
just before. Attention is a phase of an engine step, over a short context that the cache holds and over longer ones.
Rates are medians, limits the best that was seen. The last line of the output is one JSON object. Knows no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.engine.backend import BLOCK_SIZE
from gossamer.kernels import cpu
from gossamer.kernels.limits import huge_array
from gossamer.settings import threads as default_threads
from micro_linear import cycle, rate, timings

ROWS, COLUMNS = 4096, 1024
"""The weight that is hot; it fits the last cache in every format."""
COLD_BYTES = 160 << 20
TOKENS = (1, 2, 4, 6, 16, 64, 512)
TILE = 16
"""Rows of a weight that are stored together."""
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 9, 3, 64, 8
"""Attention like SmolLM2's; so many layers, and next to nothing besides."""
FILL_TOKENS = 2048
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Kernel:
    """A way to store a weight and to multiply by it."""

    bits: int
    """16 is bfloat16, 32 is float32."""
    group_size: int | None = None
    """None: the row."""
    asymmetric: bool = False
    exact: bool = False
    """True: integers by float activations."""
    sparsity: float = 0.0
    """Share of zeros; with any, the weight is held without them."""

    @property
    def name(self) -> str:
        sparse = f"-sparse{round(100 * self.sparsity)}" if self.sparsity else ""
        if self.bits > 8:
            return ("bf16" if self.bits == 16 else "f32") + sparse
        group = f"g{self.group_size}" if self.group_size else "row"
        return f"int{self.bits}-{group}{'-asym' if self.asymmetric else ''}{'-exact' if self.exact else ''}{sparse}"

    @property
    def integer(self) -> bool:
        """True if activations are bytes."""
        return self.bits <= 8 and not self.exact


KERNELS = (
    Kernel(8), Kernel(8, 64), Kernel(4, 32), Kernel(4, 64), Kernel(4, 64, asymmetric=True), Kernel(3, 64),
    Kernel(2, 64), Kernel(8, exact=True), Kernel(4, 64, exact=True), Kernel(16), Kernel(32),
    Kernel(8, sparsity=0.5), Kernel(16, sparsity=0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """One kernel at one number of tokens; for one token also with the weight out of the cache."""

    kernel: str
    tokens: int
    hot_gmacs: float
    peak_share: float
    cold_gbytes: float | None = None
    read_share: float | None = None


@dataclass(frozen=True)
class Attention:
    """Attention of one step: `queries` new tokens of each sequence, the last of them at the end of `context`."""

    kv_dtype: str
    sequences: int
    queries: int
    context: int
    gmacs: float
    peak_share: float
    gbytes: float
    """GB of keys and values in the context, over the time."""
    read_share: float


STEPS = ((1, 1, 1024), (16, 1, 2048), (1, 512, 512), (1, 512, 2048))
"""Sequences, queries and context of the attention that is timed."""


def main() -> None:
    """Measure, print two tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--isa", choices=cpu.isas(), default=cpu.isa())
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each measurement")
    args = parser.parse_args()
    cpu.use_isa(args.isa)
    bench = Bench(args.threads, args.seconds)
    print(f"isa {args.isa}, threads {args.threads}, weight {ROWS}x{COLUMNS}")
    products = bench.products()
    attention = bench.attention()
    result = {
        "benchmark": "micro_engine",
        "isa": args.isa,
        "threads": args.threads,
        "read_gbytes": round(statistics.median(bench.bandwidths), 2),
        "peak_gmacs": {kind: round(statistics.median(rates), 1) for kind, rates in bench.peaks.items()},
        "products": [rounded(asdict(row)) for row in products],
        "attention": [rounded(asdict(row)) for row in attention],
    }
    print(json.dumps(result))


class Bench:
    """Takes the figures, and the machine's limits before each of them."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.threads, self.seconds = threads, seconds
        self.memory = huge_array(256 << 20)
        self.bandwidths: list[float] = []
        self.peaks: dict[str, list[float]] = {"integer": [], "float": []}

    def products(self) -> list[Product]:
        """A line for each kernel."""
        heads = " ".join(f"{tokens:>12}" for tokens in TOKENS)
        print(f"{'hot GMAC/s':>15} {heads} {'peak':>7} {'cold GB/s':>10} {'of':>6} {'share':>6}")
        found = []
        for kernel in KERNELS:
            peak, bandwidth = self.peak(kernel.integer), self.bandwidth()
            hot = {tokens: self.hot(kernel, tokens) for tokens in TOKENS}
            cold = self.cold(kernel)
            for tokens, gmacs in hot.items():
                in_memory = (cold, cold / bandwidth) if tokens == 1 else ()
                found.append(Product(kernel.name, tokens, gmacs, gmacs / peak, *in_memory))
            cells = " ".join(f"{gmacs:7.1f} {gmacs / peak:4.0%}" for gmacs in hot.values())
            print(f"{kernel.name:>15} {cells} {peak:7.0f} {cold:10.1f} {bandwidth:6.1f} {cold / bandwidth:6.0%}")
        return found

    def attention(self) -> list[Attention]:
        """A line for each dtype of the cache and each step."""
        print(f"{'attention':>15} {'batch':>6} {'queries':>8} {'context':>8} {'GMAC/s':>8} {'share':>6} {'GB/s':>7}"
              f" {'of':>6} {'share':>6}")  # fmt: skip
        found = []
        for kv_dtype in ("f32", "bf16", "int8"):
            for sequences, queries, context in STEPS:
                row = self.attend(kv_dtype, sequences, queries, context)
                found.append(row)
                print(
                    f"{kv_dtype:>15} {sequences:6} {queries:8} {context:8} {row.gmacs:8.1f} {row.peak_share:6.0%}"
                    f" {row.gbytes:7.1f} {self.bandwidths[-1]:6.1f} {row.read_share:6.0%}"
                )
        return found

    def bandwidth(self) -> float:
        """GB/s that the machine reads now."""
        best = min(timings(lambda: cpu.read_bytes(self.memory, self.threads), self.seconds))
        self.bandwidths.append(self.memory.nbytes / best / 1e9)
        return self.bandwidths[-1]

    def peak(self, integer: bool) -> float:
        """GMAC/s of all threads on registers alone."""
        extension, rounds = cpu.extension(), 1 << 16
        with ThreadPoolExecutor(self.threads) as pool:

            def burst() -> int:
                return sum(pool.map(lambda _: int(extension.peak_products(integer, rounds)), range(self.threads)))

            while rate(burst, 0.0) < 0.01:  # so long that starting the threads does not count
                rounds *= 4
            seconds, work = min(timings(burst, self.seconds)), burst()
        self.peaks["integer" if integer else "float"].append(work / seconds / 1e9)
        return self.peaks["integer" if integer else "float"][-1]

    def hot(self, kernel: Kernel, tokens: int) -> float:
        """GMAC/s of one weight in the cache."""
        whole = rate(self.call(weight(kernel, ROWS), kernel, tokens), self.seconds)
        preparation = rate(self.call(weight(kernel, TILE), kernel, tokens), self.seconds)
        return (ROWS - TILE) * COLUMNS * tokens / (whole - preparation) / 1e9

    def cold(self, kernel: Kernel) -> float:
        """GB/s of one token by weights that lie in memory."""
        arena, first = cpu.extension().Arena(), weight(kernel, ROWS)
        copies = [weight(kernel, ROWS, arena) for _ in range(max(1, COLD_BYTES // first.nbytes))]
        turn = cycle([self.call(copy, kernel, 1) for copy in copies])
        return float(first.nbytes / rate(lambda: next(turn)(), self.seconds) / 1e9)

    def call(self, matrix: Any, kernel: Kernel, tokens: int) -> Callable[[], object]:
        """The call that multiplies random activations [tokens, COLUMNS] by a weight."""
        x = np.random.default_rng(0).standard_normal((tokens, matrix.columns), np.float32)
        y = np.empty((tokens, matrix.rows), np.float32)
        return lambda: matrix.linear(x, kernel.exact, self.threads, y)

    def attend(self, kv_dtype: str, sequences: int, queries: int, context: int) -> Attention:
        """The attention of all layers of one step."""
        peak, bandwidth = self.peak(False), self.bandwidth()
        model, blocks = attention_model(), -(-context // BLOCK_SIZE)
        model.allocate(sequences * blocks, kv_dtype)
        fill(model, self.threads)
        tables = np.random.default_rng(0).permutation(sequences * blocks).astype(np.int32).reshape(sequences, blocks)
        step = batch(sequences, queries, context, tables)
        nothing = np.empty(0, np.int32), np.empty(0, np.float32)
        samples: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(samples) < 6 or time.perf_counter() < end:
            model.phase_seconds()
            model.best(*step, True, self.threads, *nothing)
            samples.append(model.phase_seconds()["attention"])
        seconds = statistics.median(samples[1:])
        seen = sum(range(context - queries + 1, context + 1))  # over the queries, what each of them sees
        gmacs = 2 * LAYERS * HEADS * HEAD_DIM * sequences * seen / seconds / 1e9
        gbytes = sequences * blocks * model.block_bytes / seconds / 1e9
        return Attention(kv_dtype, sequences, queries, context, gmacs, gmacs / peak, gbytes, gbytes / bandwidth)


def weight(kernel: Kernel, rows: int, arena: Any = None) -> Any:
    """A random weight [rows, COLUMNS], packed. Numbers of 16 bits stay below those of infinity and NaN."""
    extension = cpu.extension()
    arena = extension.Arena() if arena is None else arena
    if kernel.sparsity:
        return extension.squeeze(arena, whole(kernel, rows, extension.Arena()), 1)
    return whole(kernel, rows, arena)


def whole(kernel: Kernel, rows: int, arena: Any) -> Any:
    """The same with its zeros."""
    extension, generator = cpu.extension(), np.random.default_rng(1)
    zeros = generator.random((rows, COLUMNS)) < kernel.sparsity
    if kernel.bits == 32:
        return extension.pack_f32(arena, [generator.standard_normal((rows, COLUMNS), np.float32)], False, 1)
    if kernel.bits == 16:
        numbers = generator.integers(0, 0x4000, (rows, COLUMNS), np.uint16)
        return extension.pack_bf16(arena, [np.where(zeros, np.uint16(0), numbers)], False, 1)
    words = generator.integers(-(2**31), 2**31, (rows, cpu.words(COLUMNS, kernel.bits)), np.int32)
    if kernel.bits == 8:
        words.view(np.uint8)[zeros] = 128
    groups = COLUMNS // kernel.group_size if kernel.group_size else 1
    scale = generator.random((rows, groups), np.float32).astype(np.float16).astype(np.float32)
    zero = generator.integers(-1, 2, (rows, groups), np.int8) if kernel.asymmetric else None
    return extension.pack_integer(arena, [extension.IntegerPart(words, scale, zero, kernel.bits)], COLUMNS, False, 1)


def attention_model() -> Any:
    """A model whose layers are all attention: of everything else there is as little as can be."""
    extension, arena = cpu.extension(), cpu.extension().Arena()
    narrow, width = 32, HEADS * HEAD_DIM

    def matrix(*shapes: tuple[int, int]) -> Any:
        parts = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in shapes]
        return extension.pack_f32(arena, parts, len(parts) > 1, 1)

    ones = np.ones(narrow, np.float32)
    embedding = matrix((64, narrow))
    model = extension.Model(
        hidden_size=narrow, vocab_size=64, head_dim=HEAD_DIM, max_positions=1 << 16, norm_eps=1e-5, norm="rms",
        activation="silu", inverse_frequencies=[np.ones(HEAD_DIM // 2, np.float32)], embedding=embedding,
        head=embedding, final_norm=ones, final_norm_bias=None,
    )  # fmt: skip
    for _ in range(LAYERS):
        model.add_layer(
            heads=HEADS, kv_heads=KV_HEADS, ffn_width=narrow, attention_norm=ones, attention_norm_bias=None,
            ffn_norm=ones, ffn_norm_bias=None, qkv=[matrix((width + 2 * KV_HEADS * HEAD_DIM, narrow))], qkv_bias=[None],
            output=matrix((narrow, width)), output_bias=None, gate_up=[matrix((narrow, narrow), (narrow, narrow))],
            gate_up_bias=[None], down=matrix((narrow, narrow)), down_bias=None,
        )  # fmt: skip
    return model


def fill(model: Any, threads: int) -> None:
    """Write every block of the cache, as a sequence of its own: memory that was never written is nowhere to be read."""
    per_step, nothing = FILL_TOKENS // BLOCK_SIZE, (np.empty(0, np.int32), np.empty(0, np.float32))
    for start in range(0, model.blocks, per_step):
        tables = np.arange(start, min(start + per_step, model.blocks), dtype=np.int32)[:, None]
        model.best(*batch(len(tables), BLOCK_SIZE, BLOCK_SIZE, tables), True, threads, *nothing)


def batch(sequences: int, queries: int, context: int, tables: Ints) -> tuple[Ints, ...]:
    """A step of equal sequences, of which no result is wanted."""
    tokens = np.random.default_rng(0).integers(0, 64, sequences * queries).astype(np.int32)
    starts = np.arange(sequences + 1, dtype=np.int32) * queries
    return tokens, starts, np.full(sequences, context, np.int32), tables, np.empty(0, np.int32)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """With floats of three decimals."""
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
