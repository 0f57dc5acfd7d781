"""The columns of the survey's table, as data: what each shows, in which unit, and which end of it is better.

Shared by the terminal, Markdown and HTML, so that the three always say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .records import BenchRecord, Spread
from .rows import Row
from .text import amount, clean, divergence, megabytes, number, percent, quality

Part: TypeAlias = Literal["model", "bench", "eval"]
MISSING = "\u2013"  # en dash
FAILED = "failed"


@dataclass(frozen=True)
class Column:
    """One number of a row. `value` is what it sorts by, `show` its text, `detail` a second, smaller text."""

    key: str
    title: str
    unit: str
    part: Part
    better: Literal["low", "high"]
    help: str
    value: Callable[[Row], float | None]
    show: Callable[[float], str]
    detail: Callable[[Row], str] = lambda row: ""

    def text(self, row: Row) -> str:
        """The number, `failed` if the run that should have made it failed, or a dash if it was not measured."""
        value = self.value(row)
        if value is not None:
            return self.show(value)
        return FAILED if self.failed(row) else MISSING

    def failed(self, row: Row) -> bool:
        """True if the run that makes this number was tried and failed."""
        record = {"model": None, "bench": row.bench, "eval": row.evaluation}[self.part]
        return record is not None and record.failed


def _bench(field: Callable[[BenchRecord], float | None]) -> Callable[[Row], float | None]:
    """A field of the row's bench, or None without one."""
    return lambda row: field(row.bench) if row.bench else None


def _median(spread: Spread | None, scale: float = 1) -> float | None:
    return spread.median * scale if spread else None


def _range(spread: Spread | None, scale: float, show: Callable[[float], str]) -> str:
    """`31.0–34.2`, the spread of a repeated measurement."""
    if spread is None or spread.min is None or spread.max is None:
        return ""
    return f"{show(spread.min * scale)}\u2013{show(spread.max * scale)}"


def _spread(name: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: _range(getattr(row.bench.results, name), scale, amount) if row.bench else ""


def _memory_parts(row: Row) -> str:
    """`108 + 46.1 kB`: weights in MB, and the KV cache per token."""
    if row.bench is None:
        return ""
    weights, kv = row.bench.results.rm_weights_bytes, row.bench.results.rm_kv_bytes_per_token
    parts = [megabytes(weights) if weights is not None else None, f"{amount(kv / 1e3)} kB" if kv is not None else None]
    return " + ".join(part for part in parts if part)


MEMORY = (
    Column("bits_per_weight", "Bits", "per weight", "model", "low",
           "stored bits over all weights, scales and zero points counted",
           lambda row: row.bits_per_weight, lambda value: number(value, 2)),
    Column("wm_bytes", "WM", "MB", "model", "low", "weight memory: bytes of the stored weights",
           lambda row: row.size_bytes, megabytes),
    Column("rm_peak_bytes", "RM", "MB peak", "bench", "low",
           "runtime memory: peak of the process; beside it the weights in MB + the KV cache per token in kB",
           _bench(lambda bench: bench.results.rm_peak_bytes), megabytes, _memory_parts),
    Column("rm_reserved_bytes", "RM", "MB reserved", "bench", "low",
           "memory that the engine set aside for keys and values beforehand, used or not",
           _bench(lambda bench: bench.results.rm_reserved_bytes), megabytes),
)  # fmt: skip
SPEED = (
    Column("prefill_tokens_per_s", "Prefill", "tok/s", "bench", "high", "prompt tokens per second, median",
           _bench(lambda bench: _median(bench.results.prefill_tokens_per_s)), amount, _spread("prefill_tokens_per_s")),
    Column("decode_tokens_per_s", "Decode", "tok/s", "bench", "high", "generated tokens per second, median",
           _bench(lambda bench: _median(bench.results.decode_tokens_per_s)), amount, _spread("decode_tokens_per_s")),
    Column("ttft_ms", "TTFT", "ms", "bench", "low", "time to first token, median",
           _bench(lambda bench: _median(bench.results.ttft_s, 1e3)), amount, _spread("ttft_s", 1e3)),
)  # fmt: skip
QUALITY = (
    Column("perplexity", "Perplexity", "", "eval", "low", "perplexity on the protocol's text",
           lambda row: row.perplexity, quality),
    Column("kld_mean", "KLD", "mean", "eval", "low", "mean KL divergence to the reference model, nats per token",
           lambda row: row.kld_mean, divergence),
    Column("kld_p99", "KLD", "p99", "eval", "low", "99th percentile of the KL divergence, nats per token",
           lambda row: row.evaluation.results.kld_p99 if row.evaluation else None, divergence),
    Column("activation_kld", "KLD", "activations", "eval", "low",
           "mean KL divergence of rounded activations from exact ones on the same weights, nats per token",
           lambda row: row.evaluation.results.activation_kld if row.evaluation else None, divergence),
    Column("top1_agreement", "Top-1", "%", "eval", "high",
           "tokens on which the model's first choice is also the reference's",
           lambda row: row.top1_agreement, percent),
)  # fmt: skip
GROUPS: tuple[tuple[str, tuple[Column, ...]], ...] = (("Memory", MEMORY), ("Speed", SPEED), ("Quality", QUALITY))
COLUMNS = (*MEMORY, *SPEED, *QUALITY)


def method(row: Row) -> str:
    """The recipe that made the model, or that it is the baseline."""
    return clean(row.recipe) if row.recipe else ("baseline" if row.baseline else MISSING)


def engine_labels(rows: Sequence[Row]) -> list[str]:
    """Distinct engines of the rows, in order of appearance."""
    return list(dict.fromkeys(clean(row.engine) for row in rows if row.engine))
