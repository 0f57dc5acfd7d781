"""How fast the linear kernels are, and how far from what the machine can read.

    python benchmarks/micro_linear.py [--threads N] [--isa NAME] [--seconds S]

Each row is one weight shape in one format. "cold" walks over copies of the weight that together do not fit in the
cache, as decoding a model does; its share is its bytes per second over the read bandwidth measured just before ("of").
"hot" repeats one weight in the cache. The last part finds from how many tokens on dequantizing and a torch product
are quicker. The last line of the output is one JSON object. Knows no model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.kernels import cpu
from gossamer.kernels.limits import huge_array
from gossamer.settings import threads as default_threads

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (2048, 2048))
FORMATS = ((2, 64), (3, 64), (4, 32), (4, 64), (8, 64), (8, None), (16, None))
"""Bits and group size (None: the row); 16 is bfloat16."""
COLD_BYTES = 160 << 20
Floats = NDArray[np.float32]
Weight = tuple[NDArray[Any], Floats | None]
"""Stored weight, and its scales [out, groups] if it is packed."""
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True)
class Row:
    """One line of the table; rates are medians."""

    out: int
    columns: int
    format: str
    tokens: int
    cold_gmacs: float
    cold_gbytes: float
    read_gbytes: float
    share: float
    hot_gmacs: float


def main() -> None:
    """Measure, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--isa", choices=cpu.isas(), default=cpu.isa())
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each measurement")
    args = parser.parse_args()
    cpu.use_isa(args.isa)
    torch.set_num_threads(args.threads)

    memory = huge_array(256 << 20)
    print(f"isa {args.isa}, threads {args.threads}")
    print(
        f"{'weight':>13} {'format':>8} {'cold GMAC/s':>12} {'cold GB/s':>10} {'of':>6} {'share':>6} {'hot GMAC/s':>11}"
    )
    rows: list[Row] = []
    for out, columns in SHAPES:
        for bits, group_size in FORMATS:
            bandwidth = read_bandwidth(memory, args.threads, args.seconds)
            row = measure(out, columns, bits, group_size, args.threads, args.seconds, bandwidth)
            rows.append(row)
            print(
                f"{f'{out}x{columns}':>13} {row.format:>8} {row.cold_gmacs:12.1f} {row.cold_gbytes:10.1f}"
                f" {row.read_gbytes:6.1f} {row.share:6.0%} {row.hot_gmacs:11.1f}"
            )
    crossover = {name: few_tokens_limit(bits, args.seconds) for name, bits in (("int4", 4), ("bf16", 16))}
    print(f"kernel quicker than dequantize + torch up to this many tokens (1536x576): {crossover}")
    result = {
        "isa": args.isa,
        "threads": args.threads,
        "read_gbytes": round(statistics.median(row.read_gbytes for row in rows), 2),
        "few_tokens_limit": crossover,
        "rows": [{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows],
    }
    print(json.dumps(result))


def read_bandwidth(memory: NDArray[np.uint8], threads: int, seconds: float) -> float:
    """GB/s at which the kernels' own threads read memory that is not in the cache."""
    return memory.nbytes / rate(lambda: cpu.read_bytes(memory, threads), seconds) / 1e9


def measure(
    out: int, columns: int, bits: int, group_size: int | None, threads: int, seconds: float, bandwidth: float
) -> Row:
    """One token times one weight, with the weight out of the cache and in it."""
    groups = 1 if group_size is None else columns // group_size
    weight_bytes = out * columns * 2 if bits == 16 else 4 * out * (cpu.words(columns, bits) + groups)
    x = np.random.default_rng(0).standard_normal((1, columns), np.float32)
    calls = [product(x, w, bits, threads) for w in copies(out, columns, bits, groups, weight_bytes)]
    turn = iter(cycle(calls))
    cold = rate(lambda: next(turn)(), seconds)
    hot = rate(calls[0], seconds)
    work = out * columns / 1e9
    name = "bf16" if bits == 16 else f"int{bits}-" + (f"g{group_size}" if group_size else "row")
    gbytes = weight_bytes / cold / 1e9
    return Row(out, columns, name, 1, work / cold, gbytes, bandwidth, gbytes / bandwidth, work / hot)


def copies(out: int, columns: int, bits: int, groups: int, weight_bytes: int) -> Iterator[Weight]:
    """Enough random weights that the cache holds few of them. bfloat16 bits stay below those of inf and nan."""
    generator = np.random.default_rng(1)
    for _ in range(max(1, COLD_BYTES // weight_bytes)):
        if bits == 16:
            yield generator.integers(0, 0x4000, (out, columns), np.uint16), None
        else:
            words = generator.integers(-(2**31), 2**31, (out, cpu.words(columns, bits)), np.int32)
            yield words, generator.random((out, groups), np.float32)


def product(x: Floats, weight: Weight, bits: int, threads: int) -> Callable[[], object]:
    """The call that multiplies x by a weight."""
    stored, scale = weight
    if scale is None:
        return lambda: cpu.dense_linear_bf16(x, stored, threads)
    group_size = x.shape[1] // scale.shape[1]
    return lambda: cpu.packed_linear(x, stored, scale, None, bits, group_size, threads)


def cycle(calls: list[Callable[[], object]]) -> Iterator[Callable[[], object]]:
    """The calls in turn, for ever."""
    while True:
        yield from calls


def rate(call: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call, over about this much time."""
    return statistics.median(timings(call, seconds))


def timings(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of several calls behind a first one, over about this much time."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def few_tokens_limit(bits: int, seconds: float) -> int:
    """Largest of TOKENS for which the kernel beats making a float weight and a torch product (weight 1536 x 576)."""
    out, columns, threads = 1536, 576, torch.get_num_threads()
    weight = next(copies(out, columns, bits, columns // 64, COLD_BYTES))
    best = 0
    for tokens in TOKENS:
        x = np.random.default_rng(0).standard_normal((tokens, columns), np.float32)
        if rate(product(x, weight, bits, threads), seconds) <= rate(torch_product(x, weight, bits, threads), seconds):
            best = tokens
    return best


def torch_product(x: Floats, weight: Weight, bits: int, threads: int) -> Callable[[], object]:
    """The call that makes a float weight and multiplies x by it in torch."""
    stored, scale = weight
    tokens = torch.from_numpy(x)
    if scale is None:
        dense = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        return lambda: tokens @ dense.float().T
    group_size = x.shape[1] // scale.shape[1]
    return lambda: tokens @ torch.from_numpy(cpu.dequantize(stored, scale, None, bits, group_size, threads)).T


if __name__ == "__main__":
    main()
