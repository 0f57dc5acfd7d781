"""The rows of the CPU benchmark: what is timed, ours beside a peer's, and the ratio that is wanted. Only data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from worker_loop import Request

LLAMA, LLAMA_AVX2 = "llama.cpp", "llama.cpp-avx2"
READ = "read bandwidth"
"""What stands in a peer's place where a row asks for our share of what the machine can read."""

PREFILL = Request("prefill", batch=1, prompt=512, output=0, depth=0)
DECODE = Request("decode", batch=1, prompt=1, output=128, depth=0)
DEEP = replace(DECODE, depth=1024)
BATCH_16 = Request("decode", batch=16, prompt=8, output=32, depth=0)
BATCH_64 = Request("decode", batch=64, prompt=8, output=16, depth=0)
"""Short, for a peer may be ten times slower."""


@dataclass(frozen=True)
class Row:
    """One comparison. `ours` and `theirs` name model files (see cpu_models.py)."""

    key: str
    title: str
    request: Request
    ours: str
    peer: str
    theirs: str
    wanted: float | None
    """The ratio of tokens per second, ours over theirs, that is a pass; None: for information."""
    isa: str | None = None
    """Instruction set that our engine is held to."""
    threads: int | None = None
    """Instead of the run's."""
    busy: bool = False
    """True: a process that computes without end competes for the cores."""

    @property
    def models(self) -> tuple[str, ...]:
        """Every model file that the row needs."""
        return (self.ours,) if self.peer == READ else (self.ours, self.theirs)


ROWS = (
    Row("decode-q4", "decode, batch 1", DECODE, "int4", LLAMA, "q4_0", 2.0),
    Row("decode-q8", "decode, batch 1", DECODE, "int8", LLAMA, "q8_0", 2.0),
    Row("decode-deep-q4", "decode at depth 1024", DEEP, "int4", LLAMA, "q4_0", 3.0),
    Row("decode-deep-q8", "decode at depth 1024", DEEP, "int8", LLAMA, "q8_0", 3.0),
    Row("batch16-llama", "decode, batch 16", BATCH_16, "int4", LLAMA, "q4_0", 3.0),
    Row("batch64-llama", "decode, batch 64", BATCH_64, "int4", LLAMA, "q4_0", 3.0),
    Row("batch16-vllm", "decode, batch 16", BATCH_16, "int8", "vllm", "bf16", 2.0),
    Row("batch16-vllm-w8a8", "decode, batch 16", BATCH_16, "int8", "vllm", "w8a8", 2.0),
    Row("batch64-vllm", "decode, batch 64", BATCH_64, "int8", "vllm", "bf16", 2.0),
    Row("batch64-vllm-w8a8", "decode, batch 64", BATCH_64, "int8", "vllm", "w8a8", 2.0),
    Row("prefill-llama", "prefill 512", PREFILL, "int4", LLAMA, "q4_0", 2.5),
    Row("prefill-openvino", "prefill 512", PREFILL, "int4", "openvino", "q4_0", 1.2),
    Row("prefill-vllm", "prefill 512", PREFILL, "int8", "vllm", "bf16", 1.4),
    Row("prefill-vllm-same", "prefill 512", PREFILL, "bf16", "vllm", "bf16", None),
    Row("prefill-transformers", "prefill 512", PREFILL, "int8", "transformers", "bf16", None),
    Row("1b-decode", "1B shape: decode, batch 1", DECODE, "1b-int4", LLAMA, "1b-q4_0", 1.2),
    Row("1b-prefill", "1B shape: prefill 512", PREFILL, "1b-int4", LLAMA, "1b-q4_0", 2.5),
    Row("1b-batch16", "1B shape: decode, batch 16", BATCH_16, "1b-int4", LLAMA, "1b-q4_0", 2.5),
    Row("avx2-decode", "AVX2: decode, batch 1", DECODE, "int4", LLAMA_AVX2, "q4_0", 1.2, isa="avx2"),
    Row("avx2-prefill", "AVX2: prefill 512", PREFILL, "int4", LLAMA_AVX2, "q4_0", 1.5, isa="avx2"),
    Row("1-thread-decode", "1 thread: decode, batch 1", DECODE, "int4", LLAMA, "q4_0", None, threads=1),
    Row("1-thread-prefill", "1 thread: prefill 512", PREFILL, "int4", LLAMA, "q4_0", None, threads=1),
    Row("busy-decode", "decode, batch 1, one busy process beside it", DECODE, "int4", LLAMA, "q4_0", 3.0, busy=True),
    Row("share-int4", "share of the read bandwidth, decode, batch 1", DECODE, "int4", READ, "", 0.8),
    Row("share-int8", "share of the read bandwidth, decode, batch 1", DECODE, "int8", READ, "", None),
    Row("share-1b", "share of the read bandwidth, 1B shape", DECODE, "1b-int4", READ, "", None),
)


def chosen(keys: str | None) -> tuple[Row, ...]:
    """The rows of a comma-separated list, in their own order, or all. Raises ValueError for a name that is no row."""
    if keys is None:
        return ROWS
    wanted = set(keys.split(","))
    unknown = wanted - {row.key for row in ROWS}
    if unknown:
        raise ValueError(f"no row {', '.join(sorted(unknown))}; there are {', '.join(row.key for row in ROWS)}")
    return tuple(row for row in ROWS if row.key in wanted)


def quick(row: Row) -> Row:
    """The same row with a quarter of the output."""
    return replace(row, request=replace(row.request, output=row.request.output // 4))
