"""A model in an engine as a row to be: the job that measures it, and what a record says of how that went.

A row that cannot even start (no such engine here, a file that it does not open) is one that has failed, with the way
out. Knows peers and servers; runs nothing but the job that reads a model's files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ... import settings
from ...errors import GossamerError
from ..plans import LARGEST_NLL, SpeedPlan, WindowPlan
from ..records import engine_block
from ..timing import Timing, rates
from ..worker import Job, Progress, Worker, WorkerError
from .peers import GIB, OURS, PEERS, is_url

KV_BYTES = 4
"""Bytes of the widest number that an engine stores keys and values as: what room is made for."""


@dataclass(frozen=True)
class Entry:
    """One row: our own engine, which reports all of itself."""

    model: str
    engine: str = OURS
    job: Job | None = None
    """None: it cannot start, and `error` says why."""
    error: dict[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is known before it starts: "model", and of its windows what an eval's protocol says."""

    def engine_block(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What a record says of the engine."""
        return engine_block(**(facts.get("engine") or {"backend": None}))

    def results(self, value: dict[str, Any]) -> dict[str, Any]:
        """The results of a bench record from the job's last value."""
        return value

    def judged(self, value: dict[str, Any]) -> dict[str, Any] | None:
        """{"results"} or {"error"} of an eval record from the job's last value; None: it has none."""
        return None


@dataclass(frozen=True)
class PeerEntry(Entry):
    """One row of another engine."""

    plan: SpeedPlan = field(default_factory=SpeedPlan)
    context: int = 0
    """Tokens of a window that it judges."""
    kv_elements: int = 0

    def engine_block(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        told = facts.get("engine") or {}
        known = {name: told.get(name) for name in ("backend", "version", "dtype", "kernels", "activations", "kv_cache")}
        return {"name": self.engine, **known}

    def results(self, value: dict[str, Any]) -> dict[str, Any]:
        timings = [Timing(*pair) for pair in value["timings"][self.plan.warmup :]]
        size, width = self.facts["model"]["weight_bytes"], value["kv_element_bytes"]
        return {
            "wm_bytes": size,
            "rm_weights_bytes": value["rm_weights_bytes"],
            "rm_kv_bytes_per_token": None if width is None else self.kv_elements * width,
            "rm_kv_source": None if width is None else "computed",
            "rm_peak_bytes": value["rm_peak_bytes"],
            "rm_reserved_bytes": value["rm_reserved_bytes"],
            "bare_bytes": value["bare_bytes"],
            **rates(timings, self.plan),
            "load_s": value["load_s"],
        }

    def judged(self, value: dict[str, Any]) -> dict[str, Any] | None:
        told = value["judged"]
        if told is None or "error" in told:
            return told
        nll, seconds = told["nll"], told["seconds"]
        if nll > LARGEST_NLL:
            return {"error": {"kind": "MeasureError", "message": f"a perplexity of exp({nll:.4g})", "hint": None}}
        read = self.facts["windows"] * self.context
        return {
            "results": {
                "perplexity": math.exp(nll),
                "nll": nll,
                **dict.fromkeys(("kld_mean", "kld_p99", "top1_agreement", "activation_kld")),
                "seconds": seconds,
                "tokens_per_second": read / seconds,
                "samples": [],
            }
        }


def enter(
    models: Sequence[str],
    engines: Sequence[str],
    plan: SpeedPlan,
    progress: Progress,
    threads: int | None,
    asked: Mapping[str, Any],
    judged: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> list[Entry]:
    """A row for each model and engine. `asked`: options of our own engine; `judged`: which windows of which text."""
    entries: list[Entry] = []
    for model in models:
        others = [engine for engine in engines if engine != OURS]
        described = _described(model, plan, progress, threads, judged) if others else ({}, {})
        for engine in engines:
            if engine == OURS:
                arguments = {"model": model, "plan": asdict(plan), **asked}
                entries.append(Entry(model, job=Job("gossamer.measure.jobs:bench_model", arguments, threads)))
            else:
                entries.append(_peer_entry(model, engine, plan, described, threads, judged, api_key))
    return entries


def _described(
    model: str, plan: SpeedPlan, progress: Progress, threads: int | None, judged: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts and the value of `describe_model`; {"error"} for a value where it failed."""
    arguments = {"model": model, "plan": asdict(plan), "judged": judged}
    with Worker(Job("gossamer.measure.jobs:describe_model", arguments, threads), progress) as worker:
        try:
            return worker.facts, next(worker)
        except WorkerError as error:
            return worker.facts, {"error": {"kind": error.kind, "message": error.message, "hint": error.hint}}


def _peer_entry(
    model: str,
    engine: str,
    plan: SpeedPlan,
    described: tuple[dict[str, Any], dict[str, Any]],
    threads: int | None,
    judged: Mapping[str, Any] | None,
    api_key: str | None,
) -> PeerEntry:
    facts, value = described
    if "error" in value:
        return PeerEntry(model, engine, error=value["error"], facts=facts, plan=plan)
    try:
        job = _job(model, engine, plan, value, settings.threads() if threads is None else threads, judged, api_key)
    except GossamerError as error:
        failure = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        return PeerEntry(model, engine, error=failure, facts=facts, plan=plan)
    context = judged["plan"]["context"] if judged else 0
    return PeerEntry(model, engine, job, facts=facts, plan=plan, context=context, kv_elements=value["kv_elements"])


def _job(
    model: str,
    engine: str,
    plan: SpeedPlan,
    value: Mapping[str, Any],
    threads: int,
    judged: Mapping[str, Any] | None,
    api_key: str | None,
) -> Job:
    """The job of a peer or a server. Raises EngineMissing, UnsupportedModel, UsageError."""
    windows = WindowPlan(**judged["plan"]) if judged else None
    arguments = {
        "prompts": value["prompts"],
        "output_tokens": plan.output_tokens,
        "windows": value["windows"],
        "scored": windows.scored if windows else 0,
    }
    if is_url(engine):
        asked = {**arguments, "url": engine, "model": model, "api_key": api_key}
        return Job("gossamer.measure.engines.url:bench_server", asked, threads)
    peer = PEERS[engine]
    peer.check(model, value["form"])
    context = max(plan.prompt_tokens + plan.output_tokens, windows.context + 1 if windows else 0)
    memory = plan.batch * context * value["kv_elements"] * KV_BYTES
    shape = {"batch": plan.batch, "context": context, "kv_elements": value["kv_elements"]}
    return peer.job({**arguments, **shape, "model": value["path"], "kv_memory": max(memory, GIB)}, threads)
