"""Judge a model in shards: a few windows of the text each, scored by whoever has time, here or on another machine.

    examine the model -> shards of windows, each scored somewhere -> scores in the text's order -> one record

Scores come token by token and are put together in one order, so the numbers are those of `run.evaluate_models`, bit for
bit, whoever scored what. Finished shards are durable: a run that was killed goes on with the others. Knows no tensor,
and not where shards are scored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from .. import __version__
from ..checkpoint.atomic import Lock, write_file
from ..checkpoint.journal import Journal, differences, discard
from ..errors import MeasureError, ResumeMismatch
from .records import Record, machine_block
from .run import EvalRequest, eval_arguments, eval_protocol, eval_record, failure, worth_another_try
from .scores import Scores
from .worker import Job, Progress, Worker, WorkerError, describe

WINDOWS = 8
"""Of a shard: scoring them should take longer than loading the model."""

Answer: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""The facts that a job reported, and {"value"} or {"error"}."""
Spread: TypeAlias = Callable[[Iterable[tuple[str, Callable[[], Answer]]]], Iterable[tuple[str, Answer]]]
"""Has named pieces of work done, and gives the name and the result of each as it ends."""


def evaluate_in_shards(
    models: Sequence[str], request: EvalRequest, progress: Progress, spread: Spread, work: Path | None = None
) -> Iterator[Record]:
    """One eval record for each model, in order, each judged by itself beside the reference.

    `work`: the folder that keeps the shards of a record until whoever asked takes the next one, for a run that is
    killed; without it they are lost. Raises OutputLocked if another run judges the same there, and what `spread` does.
    """
    if work is None:
        with tempfile.TemporaryDirectory() as folder:
            yield from evaluate_in_shards(models, request, progress, spread, Path(folder, "shards"))
        return
    for model in models:
        yield from _evaluate(model, request, progress, spread, work)
    with contextlib.suppress(OSError):  # shards of another request are there
        work.rmdir()


def _evaluate(model: str, request: EvalRequest, progress: Progress, spread: Spread, work: Path) -> Iterator[Record]:
    asked = {"model": model, **eval_arguments(request)}
    facts, answer = answer_of(Job("gossamer.measure.jobs:examine_model", asked, request.threads), progress)
    if "error" in answer:
        yield eval_record(model, 0, request, facts, answer)
        return
    header = {
        "model": facts["model 0"]["fingerprint"],
        "protocol": eval_protocol(request, facts),
        "shard": WINDOWS,
        "gossamer": __version__,
        "torch": machine_block()["torch"],
    }
    folder = work / hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
    with Lock(folder):
        shards = _Shards(folder, header, answer["value"])
        shards.score(asked, request.threads, progress, spread)
        engine, found = shards.outcome()
        yield eval_record(model, 0, request, facts | {"engine 0": engine}, found)
        if not worth_another_try(found.get("error")):
            discard(folder)


def answer_of(job: Job, progress: Progress = lambda *_: None) -> Answer:
    """Run a job in a process of its own, to its first value: what a shard is, wherever it is scored."""
    with Worker(job, progress) as worker:
        try:
            return worker.facts, {"value": next(worker)}
        except WorkerError as error:
            return worker.facts, failure(error)


class _Shards:
    """The shards of one record: which windows each has, and what came of it."""

    def __init__(self, folder: Path, header: Mapping[str, Any], windows: int) -> None:
        firsts = range(0, windows, WINDOWS)
        self.windows = {f"shard-{n:05d}": (first, first + WINDOWS) for n, first in enumerate(firsts)}
        self.failed: dict[str, Answer] = {}
        try:
            self.journal = Journal(folder, header)
        except ResumeMismatch:  # damaged: the folder's name says that it is of this very work
            discard(folder)
            self.journal = Journal(folder, header)

    def score(self, asked: Mapping[str, Any], threads: int | None, progress: Progress, spread: Spread) -> None:
        """Have all shards scored that are not yet; only the first one answers prompts."""
        works = []
        for name, windows in self.windows.items():
            samples = asked["samples"] if windows[0] == 0 else 0
            job = Job("gossamer.measure.jobs:score_windows", {**asked, "samples": samples, "windows": windows}, threads)
            if name not in self.journal.done:
                works.append((name, partial(answer_of, job)))
        progress("judging", len(self.journal.done), len(self.windows))
        for name, (facts, answer) in spread(works):
            if "error" in answer:
                self.failed[name] = facts, answer
            else:
                self._keep(name, {"engine": facts["engine 0"], **answer["value"]})
            progress("judging", len(self.journal.done), len(self.windows))

    def _keep(self, name: str, found: Mapping[str, Any]) -> None:
        file = self.journal.folder / f"{name}.json"
        write_file(file, json.dumps(found).encode())
        self.journal.add(name, file, {})

    def outcome(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What computed, and {"results"} or {"error"}: of several errors that of the earliest windows."""
        if self.failed:
            facts, answer = self.failed[min(self.failed)]
            return facts.get("engine 0"), answer
        found = [json.loads((self.journal.folder / f"{name}.json").read_bytes()) for name in self.windows]
        engine = found[0]["engine"]
        for other in found[1:]:
            for what, one, another in differences(engine, other["engine"]):
                return engine, {"error": describe(_unlike(what, one, another))}
        quality = Scores.joined(Scores(**shard["scores"]) for shard in found).quality()
        if isinstance(quality, MeasureError):
            return engine, {"error": describe(quality)}
        return engine, {"results": {**quality.results(), "samples": found[0]["samples"]}}


def _unlike(what: str, one: Any, another: Any) -> MeasureError:
    return MeasureError(
        f"shards were scored by different engines: {what} was {one} and {another}",
        hint="GOSSAMER_ISA=avx2 has processors that differ compute alike",
    )
