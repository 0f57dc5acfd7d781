"""What Prometheus reads of several replicas: the metrics of each, told apart by one more label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ..metrics import PREFIX

LABEL = "replica"


def merged(texts: Iterable[tuple[str, bytes]], retried: int) -> bytes:
    """One text of those of all replicas, each with its name; `retried`: requests that a second one was asked for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Replicas(texts, retried))
    return generate_latest(registry)


class _Replicas(Collector):
    def __init__(self, texts: Iterable[tuple[str, bytes]], retried: int) -> None:
        self._texts, self._retried = texts, retried

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts:
            for family in text_string_to_metric_families(text.decode()):
                found = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                labelled = (sample._replace(labels={**sample.labels, LABEL: replica}) for sample in family.samples)
                found.samples.extend(labelled)
        yield from families.values()
        retries = CounterMetricFamily(f"{PREFIX}request_retries", "Requests that a second replica was asked for.")
        retries.add_metric([], self._retried)
        yield retries
