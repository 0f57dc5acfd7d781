"""Measure models, each in a process of its own, and yield one record for each: measured, or failed with the reason.

Quality: models that share a reference are judged side by side, so that the reference is computed once; a model that
did not fit beside the others, or whose process died with them, is tried once more alone. Speed: all models stay loaded
and take turns, A B A B, so that a machine that drifts drifts for all alike; one that finds no room beside the others
runs alone after them, and its protocol says so. Knows no command line, and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import errors, settings
from ..errors import UnknownName
from .corpus import Corpus
from .engines.entries import Entry, enter
from .engines.peers import OURS
from .plans import SoakPlan, SpeedPlan, WindowPlan
from .records import Kind, Record, engine_block, make_record, unknown_model_block
from .worker import Job, Progress, Worker, WorkerError

if TYPE_CHECKING:
    from ..engine.backend import Activations, BackendName, Weights
    from ..engine.sharded.nodes import Nodes


@dataclass(frozen=True)
class EvalRequest:
    """What to judge and how. `tokens` limits how much of the corpus is used."""

    corpus_source: str
    corpus: Corpus
    plan: WindowPlan
    reference: str | None = None
    tokens: int | None = None
    samples: int = 3
    weights: Weights = "stored"
    backend: BackendName = "auto"
    activations: Activations = "auto"
    threads: int | None = None
    kv_cache: str = "auto"
    """What the models' keys and values are stored as; the reference's are stored as its backend does by itself."""
    tp: int = 1
    pp: int = 1
    """Processes that share every layer, and stages of layers: of the models and of the reference."""
    nodes: Nodes | None = None
    """Machines that those are on: each model that is loaded waits for the others to join."""


def check_engine(name: str) -> None:
    """Raises UnknownName unless this engine can be judged by itself."""
    if name != OURS:
        raise UnknownName("engine", name, (OURS,))


def evaluate_models(models: Sequence[str], request: EvalRequest, progress: Progress) -> Iterator[Record]:
    """One eval record for each model, in order."""
    if request.reference is None:
        for model in models:
            yield from _evaluate_group([model], request, progress)
    elif models:
        yield from _evaluate_group(models, request, progress)


def _evaluate_group(models: Sequence[str], request: EvalRequest, progress: Progress) -> Iterator[Record]:
    """Records of models judged in one process; those that failed for want of room are judged again, alone."""
    facts, answers = _evaluate_together(models, request, progress)
    for index, (model, answer) in enumerate(zip(models, answers, strict=True)):
        if len(models) > 1 and worth_another_try(answer.get("error")):
            yield from _evaluate_group([model], request, progress)
            continue
        yield eval_record(model, index, request, facts, answer)


def eval_record(model: str, index: int, request: EvalRequest, facts: dict[str, Any], answer: dict[str, Any]) -> Record:
    """The record of one model, the `index`-th of its job, by what the job reported: {"results"} or {"error"}."""
    return _record(
        "eval",
        facts.get(f"model {index}") or unknown_model_block(model),
        eval_protocol(request, facts),
        answer,
        request.threads,
        engine_block(**(facts.get(f"engine {index}") or facts.get("engine") or {"backend": None})),
    )


def worth_another_try(error: dict[str, Any] | None) -> bool:
    """True if a model may do better alone: no room beside the others, or a crash that need not have been its own."""
    return error is not None and (error["kind"] == "DoesNotFit" or not hasattr(errors, error["kind"]))


def _evaluate_together(
    models: Sequence[str], request: EvalRequest, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the worker reported and, for each model, {"results"} or {"error"}."""
    asked = {"models": list(models), **eval_arguments(request)}
    job = Job("gossamer.measure.jobs:evaluate_models", asked, request.threads)
    with Worker(job, progress) as worker:
        try:
            return worker.facts, next(worker)
        except WorkerError as error:
            return worker.facts, [failure(error)] * len(models)


def eval_arguments(request: EvalRequest) -> dict[str, Any]:
    """What every job that judges is asked."""
    return {
        "reference": request.reference,
        "corpus": request.corpus_source,
        "corpus_sha256": request.corpus.sha256,
        "plan": asdict(request.plan),
        "tokens": request.tokens,
        "samples": request.samples,
        "weights": request.weights,
        "backend": request.backend,
        "activations": request.activations,
        "kv_cache": request.kv_cache,
        "tp": request.tp,
        "pp": request.pp,
        "nodes": request.nodes,
    }


def eval_protocol(request: EvalRequest, facts: dict[str, Any]) -> dict[str, Any]:
    """What records say of how models were judged."""
    return {
        "corpus": request.corpus.name,
        "corpus_sha256": request.corpus.sha256,
        **asdict(request.plan),
        "tokens": request.tokens,
        "windows": facts.get("windows"),
        "tokens_scored": facts.get("tokens_scored"),
        "tokens_sha256": facts.get("tokens_sha256"),
        "reference": request.reference,
        "reference_fingerprint": facts.get("reference_fingerprint"),
        "samples": request.samples,
        "weights": request.weights,
        "backend": request.backend,
        "activations": request.activations,
        "threads": _threads(request.threads),
        **_if_chosen(request.kv_cache, request.tp, request.pp, request.nodes),
    }


def _if_chosen(kv_cache: str, tp: int = 1, pp: int = 1, nodes: Nodes | None = None) -> dict[str, Any]:
    """A protocol's entries for what was chosen: absent otherwise, as in records that are older than the choice."""
    nnodes = 1 if nodes is None else nodes.nnodes
    chosen = {"kv_cache": (kv_cache, "auto"), "tp": (tp, 1), "pp": (pp, 1), "nodes": (nnodes, 1)}
    return {name: value for name, (value, usual) in chosen.items() if value != usual}


def bench_models(
    models: Sequence[str],
    plan: SpeedPlan,
    progress: Progress,
    weights: Weights = "stored",
    threads: int | None = None,
    backend: BackendName = "auto",
    activations: Activations = "auto",
    kv_cache: str = "auto",
    engines: Sequence[str] = (OURS,),
    judged: EvalRequest | None = None,
    api_key: str | None = None,
    tp: int = 1,
    pp: int = 1,
    nodes: Nodes | None = None,
) -> Iterator[Record]:
    """One bench record for each model and engine, in order: loaded one after another, then run in turns.

    With `judged` an eval record follows for each, of the text that it names; `api_key` is for servers; `tp`, `pp` and
    `nodes` for our own engine.
    """
    asked = {"weights": weights, "backend": backend, "activations": activations, **_if_chosen(kv_cache, tp, pp)}
    protocol = {**asdict(plan), **asked, **_if_chosen("auto", nodes=nodes), "threads": _threads(threads)}
    asked |= {} if nodes is None else {"nodes": nodes}
    text = None if judged is None else _text_of(judged)
    for racer in _race(enter(models, engines, plan, progress, threads, asked, text, api_key), plan, progress):
        alone = racer.crowded_out
        ran = _race([racer.entry], plan, progress)[0] if alone else racer
        model, engine = ran.facts.get("model") or unknown_model_block(ran.entry.model), ran.engine_block()
        protocols = {**protocol, "turns": "alone"} if alone else protocol
        yield _record("bench", model, protocols, ran.answer(), threads, engine)
        if judged is not None and (answer := ran.judged()) is not None:
            yield _record("eval", model, eval_protocol(judged, ran.facts), answer, threads, engine)
    if judged is not None and OURS in engines:
        yield from evaluate_models(models, judged, progress)


def _text_of(request: EvalRequest) -> dict[str, Any]:
    """Which windows of which text, as a job takes it."""
    return {
        "corpus": request.corpus_source,
        "corpus_sha256": request.corpus.sha256,
        "plan": asdict(request.plan),
        "tokens": request.tokens,
    }


def soak_model(
    model: str,
    request: EvalRequest,
    plan: SoakPlan,
    progress: Progress,
) -> Record:
    """One soak record: of `request`, what to judge on and with what. Ctrl-C ends it with what there is by then."""
    job = Job(
        "gossamer.measure.soak:soak_model",
        {
            "model": model,
            "reference": request.reference,
            "corpus": request.corpus_source,
            "plan": asdict(plan),
            "weights": request.weights,
            "backend": request.backend,
            "activations": request.activations,
            "kv_cache": request.kv_cache,
        },
        request.threads,
    )
    found: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    with Worker(job, progress) as worker:
        try:
            for value in worker:
                found = value
        except WorkerError as end:
            error = failure(end)["error"]
        except KeyboardInterrupt:
            if not found:
                raise
            worker.close(kill=True)
        facts = worker.facts
    record = _record(
        "soak",
        facts.get("model") or unknown_model_block(model),
        _soak_protocol(request, plan, facts),
        {"results": found} if error is None else {"error": error},
        request.threads,
        engine_block(**(facts.get("engine") or {"backend": None})),
    )
    return record | {"results": found}


def _soak_protocol(request: EvalRequest, plan: SoakPlan, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "corpus": request.corpus.name,
        "corpus_sha256": request.corpus.sha256,
        **asdict(plan),
        "reference": request.reference,
        "reference_fingerprint": facts.get("reference_fingerprint"),
        "weights": request.weights,
        "backend": request.backend,
        "activations": request.activations,
        "threads": _threads(request.threads),
        **_if_chosen(request.kv_cache),
    }


def _race(entries: Sequence[Entry], plan: SpeedPlan, progress: Progress) -> list[_Racer]:
    """Models that have run in turns, one repetition each, all of them loaded; none is alive any more."""
    runs = plan.warmup + plan.repetitions
    with ExitStack() as stack:
        racers: list[_Racer] = []
        for entry in entries:
            worker = None if entry.job is None else stack.enter_context(Worker(entry.job, progress))
            racers.append(_Racer(entry, worker))
            racers[-1].step(racers)  # loads
        for turn in range(runs):
            progress("timing", turn, runs)
            for racer in racers:
                racer.step(racers)
        progress("timing", runs, runs)
        for racer in racers:
            racer.step(racers)
    return racers


class _Racer:
    """One model in its own process that loads, and then runs once whenever it is told to."""

    def __init__(self, entry: Entry, worker: Worker | None) -> None:
        self.entry = entry
        self.error = entry.error
        self.crowded_out = False
        """True if it failed while others were loaded, in a way that may have been for want of room."""
        self._worker = worker
        self._value: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the model and of its engine."""
        return {**self.entry.facts, **(self._worker.facts if self._worker is not None else {})}

    def step(self, racers: Sequence[_Racer]) -> None:
        """Take the worker's next value: nothing, or at the end the results. A worker that failed is let go."""
        if self.error is not None or self._worker is None:
            return
        try:
            self._value = next(self._worker)
        except WorkerError as error:
            self.error = failure(error)["error"]
            self.crowded_out = worth_another_try(self.error) and any(other.error is None for other in racers)
            self._worker.close(kill=True)

    def engine_block(self) -> dict[str, Any]:
        """What its records say of the engine."""
        return self.entry.engine_block(self.facts)

    def answer(self) -> dict[str, Any]:
        """{"results"} or {"error"} of its bench record."""
        if self.error is not None or self._value is None:
            return {"error": self.error}
        return {"results": self.entry.results(self._value)}

    def judged(self) -> dict[str, Any] | None:
        """The same of its eval record, if it has one."""
        return None if self.error is not None or self._value is None else self.entry.judged(self._value)


def _record(
    kind: Kind,
    model: dict[str, Any],
    protocol: dict[str, Any],
    answer: dict[str, Any],
    threads: int | None,
    engine: dict[str, Any],
) -> Record:
    error = answer.get("error")
    return make_record(
        kind,
        model=model,
        engine=engine,
        protocol=protocol,
        results=answer.get("results"),
        error=None if error is None else f"{error['kind']}: {error['message']}" + _parenthesis(error["hint"]),
        threads=_threads(threads),
    )


def failure(error: WorkerError) -> dict[str, Any]:
    """The answer of a job that failed."""
    return {"error": {"kind": error.kind, "message": error.message, "hint": error.hint}}


def _parenthesis(hint: str | None) -> str:
    return "" if hint is None else f" ({hint})"


def _threads(threads: int | None) -> int:
    return settings.threads() if threads is None else threads
