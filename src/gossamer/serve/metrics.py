"""What Prometheus reads: the names of vLLM's dashboards, under the prefix `gossamer:`. Knows no HTTP and no engine.

Times are measured here as requests go by; the rest is read from the engines' own counters when somebody looks. Those
counters begin at 0 again when a worker is restarted, which Prometheus knows how to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.sequence import EngineStats

PREFIX = "gossamer:"
LABEL = "model_name"
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 600.0)
"""Seconds: the upper ends of the buckets of each histogram."""

GAUGES: Mapping[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Completions that run.", lambda s: s.running),
    "num_requests_waiting": ("Completions that wait for their turn.", lambda s: s.waiting),
    "kv_cache_usage_perc": (
        "Share of the KV cache that requests hold; 1 is all of it.",
        lambda s: s.kv_blocks_used / s.kv_blocks if s.kv_blocks else 0.0,
    ),
}
COUNTERS: Mapping[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_preemptions": ("Completions that gave their cache to an older one.", lambda s: s.preemptions),
    "prefix_cache_queries": ("Prompt tokens that were looked for in the cache.", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens that were found there.", lambda s: s.prefix_hits),
    "prompt_tokens": ("Tokens of prompts.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens of answers.", lambda s: s.generated_tokens),
    "spec_decode_num_draft_tokens": ("Tokens that were guessed.", lambda s: s.drafted_tokens),
    "spec_decode_num_accepted_tokens": ("Guesses that were right.", lambda s: s.accepted_tokens),
}
"""Without the `_total` that the name of a counter ends with."""


class Metrics:
    """All models' metrics. `stats`: how each engine stands, asked for at every look."""

    def __init__(self, stats: Mapping[str, Callable[[], EngineStats]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Engines(stats))
        self._first = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN
        )
        self._between = self._histogram("inter_token_latency_seconds", "From one token to the next.", PER_TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its end.", REQUEST)
        self._queued = self._histogram("request_queue_time_seconds", "From the request to its first step.", REQUEST)
        self._finished = Counter(
            f"{PREFIX}request_success", "Completions by how they ended.", [LABEL, "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        for model in stats:
            for histogram in (self._first, self._between, self._whole, self._queued):
                histogram.labels(model)
            for reason in ("stop", "length", "abort"):
                self._finished.labels(model, reason)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def started(self, model: str, seconds: float) -> None:
        self._queued.labels(model).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def tokens(self, model: str, count: int, seconds: float) -> None:
        """So many tokens came so long after the one before."""
        for _ in range(count):
            self._between.labels(model).observe(seconds / count)

    def finished(self, model: str, reason: str) -> None:
        self._finished.labels(model, reason).inc()

    def ended(self, model: str, seconds: float) -> None:
        self._whole.labels(model).observe(seconds)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}{name}", what, [LABEL], buckets=buckets, registry=self._registry)


class _Engines(Collector):
    """The engines' own numbers."""

    def __init__(self, stats: Mapping[str, Callable[[], EngineStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        now = {model: ask() for model, ask in self._stats.items()}
        for kind, rows in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (what, value) in rows.items():
                family = kind(f"{PREFIX}{name}", what, labels=[LABEL])
                for model, stats in now.items():
                    family.add_metric([model], value(stats))
                yield family
