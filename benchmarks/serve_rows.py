"""The rows of the serving benchmark: which servers, under which load, and the ratio that is wanted. Only data."""

from __future__ import annotations

from dataclasses import dataclass, replace

GOSSAMER, LLAMA_SERVER, VLLM = "gossamer", "llama-server", "vllm"


@dataclass(frozen=True)
class Side:
    """A server and the model file that it serves (see cpu_models.py)."""

    server: str
    model: str


@dataclass(frozen=True)
class Load:
    """What the clients ask; lengths in tokens, as MEAN:SPREAD."""

    requests: int
    concurrency: int
    prompts: str
    outputs: str
    prefix: int = 0
    """Tokens before each prompt."""
    shared: bool = True
    """False: each prompt has a prefix of its own, of the same length."""
    warmup: int = 64


@dataclass(frozen=True)
class Row:
    """One comparison: ours over the peer's, with what each is asked."""

    key: str
    title: str
    ours: Side
    peer: Side
    load: Load
    metric: str
    """`throughput`: output tokens per second, ours over theirs; `ttft`: mean time to first token, theirs over ours."""
    wanted: float | None
    peer_load: Load | None = None
    """Where the two sides are not asked the same."""
    p99_ttft: bool = False
    """True: the p99 of our time to first token must be no worse."""

    @property
    def models(self) -> tuple[str, ...]:
        """Every model file that the row needs."""
        return tuple(dict.fromkeys((self.ours.model, self.peer.model)))

    def load_of(self, side: str) -> Load:
        """What `ours` or `peer` is asked."""
        return self.peer_load if side == "peer" and self.peer_load is not None else self.load


MIXED = Load(requests=128, concurrency=64, prompts="272:240", outputs="136:120", warmup=16)
"""Prompts of 32 to 512 tokens, answers of 16 to 256: 52,000 tokens, which the slowest peer takes ten minutes for."""
PREFIX = Load(requests=50, concurrency=1, prompts="32:16", outputs="16", prefix=1000, warmup=4)
OWN_PREFIX = replace(PREFIX, shared=False)
"""The same work for a server that reuses nothing: no two prompts begin alike."""

OURS_4, OURS_8 = Side(GOSSAMER, "int4"), Side(GOSSAMER, "int8")
CLIENTS = "64 clients, prompts 32-512, answers 16-256"
SHARED = "50 requests behind 1,000 shared tokens, beside 50 whose 1,000 tokens are their own"

ROWS = (
    Row("mixed-llama", CLIENTS, OURS_4, Side(LLAMA_SERVER, "q4_0"), MIXED, "throughput", 2.0, p99_ttft=True),
    Row("mixed-vllm", CLIENTS, OURS_8, Side(VLLM, "bf16"), MIXED, "throughput", 1.5, p99_ttft=True),
    Row("mixed-vllm-w8a8", CLIENTS, OURS_8, Side(VLLM, "w8a8"), MIXED, "throughput", 1.5, p99_ttft=True),
    Row("prefix-reuse", SHARED, OURS_4, OURS_4, PREFIX, "ttft", 5.0, peer_load=OWN_PREFIX),
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
    """The same row with a load that is over in seconds, and that says nothing about speed."""
    peer_load = None if row.peer_load is None else _small(row.peer_load)
    title = f"a few requests, not: {row.title}"
    return replace(row, title=title, load=_small(row.load), peer_load=peer_load, wanted=None, p99_ttft=False)


def _small(load: Load) -> Load:
    prefix = min(load.prefix, 100)
    return replace(
        load, requests=8, concurrency=min(4, load.concurrency), prompts="24:8", outputs="6:2", prefix=prefix, warmup=2
    )
