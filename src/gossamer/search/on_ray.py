"""A study on a Ray cluster: each making, each judgement and each timing is a task of its own.

Tasks only measure. This process alone appends records to the study's file, as they come, so that the same command goes
on where it stopped, with a cluster or without. A task whose node is lost is done again on another. Artifacts lie where
a study without a cluster puts them: all nodes must see the folder, under the same path.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from .. import settings
from ..cluster.join import joined, most_cpus
from ..cluster.place import Place
from ..compress.recipe import Recipe
from ..errors import ClusterError, GossamerError
from ..measure.records import Record
from ..measure.worker import Progress
from .study_precision import Make, PrecisionStudy
from .work import Measurement, Work

TRIES = 4
"""How often a task is begun until a node that runs it is not lost."""
SECONDS_PER_LOOK = 30.0
"""How often the cluster is looked at while nothing ends."""
SECONDS_OF_A_LOCK = 120.0
"""How long the output of a task may stay locked: by what is left of a node that was lost."""

Study = TypeVar("Study", bound=PrecisionStudy)
Task: TypeAlias = "tuple[str, Measurement | None]"
"""Making a variant (its name, None), or measuring a model (its name or folder)."""


def with_threads(study: Study) -> Study:
    """The study with its number of threads said, for nodes may have others."""
    threads = settings.threads() if study.request.threads is None else study.request.threads
    return replace(study, request=replace(study.request, threads=threads))


def run_study_on_ray(study: PrecisionStudy, make: Make, progress: Progress, address: str) -> list[Record]:
    """All records of the study, as `run_study` gives them; each task takes as many CPUs as it has threads.

    Raises ClusterError: no Ray, no cluster, no node with so many CPUs or without the study's folder, or a task whose
    node was lost again and again. What was measured by then is in the file.
    """
    assert study.request.threads is not None
    with joined(address) as ray:
        return _Driver(study, make, progress, ray, study.request.threads).records()


class _Driver:
    """What runs, what came of it, and what follows."""

    def __init__(self, study: PrecisionStudy, make: Make, progress: Progress, ray: Any, threads: int) -> None:
        self.study, self.make, self.progress, self.ray, self.threads = study, make, progress, ray, threads
        self.work = Work(study)
        self.done: dict[Task, Record] = {}
        self.lost: dict[Task, str] = {}
        self.running: dict[Any, Task] = {}
        options = {"num_cpus": threads, "max_retries": TRIES - 1, "scheduling_strategy": "SPREAD"}
        self.begin = ray.remote(**options)(_performed)
        self.place, self.records_file = Place(), study.records.absolute()

    def records(self) -> list[Record]:
        self._require_a_node()
        for name in self.work.made:
            self._take_or_begin((name, None), self.work.artifact(name))
        self._measure(self.study.model, self.study.fingerprint)
        while self.running:
            self.progress("tasks", len(self.done), len(self.done) + len(self.running))
            ended, _ = self.ray.wait(list(self.running), timeout=SECONDS_PER_LOOK)
            for task in ended:
                self._end(self.running.pop(task), task)
            if not ended:
                self._require_a_node()
        if self.lost:
            (first, _), why = next(iter(self.lost.items()))
            raise ClusterError(
                f"{len(self.lost)} tasks were lost with their nodes, the first of {first}: {why}",
                hint="the same command goes on with them",
            )
        made = {name: self.done[name, None] for name in self.work.made}
        models = self.work.models(made)
        measured = [self.done[model, m] for m in self.work.measurements for model in m.among(models)]
        return [*made.values(), *measured]

    def _measure(self, model: str, fingerprint: str) -> None:
        for measurement in self.work.measurements:
            if model in measurement.among({model: fingerprint}):
                self._take_or_begin((model, measurement), self.work.measured(measurement, fingerprint))

    def _take_or_begin(self, task: Task, held: Record | None) -> None:
        """Take the record that the file holds, or have a node make one."""
        if held is not None:
            self._take(task, held)
        else:
            name, measurement = task
            work = self._making(name) if measurement is None else partial(_measured, measurement, name)
            self.running[self.begin.remote(self.place, self.records_file, work)] = task

    def _making(self, name: str) -> Callable[[], Record]:
        return partial(_made, self.make, self.study.recipe(name), self.study.artifact(name))

    def _end(self, task: Task, result: Any) -> None:
        try:
            record: Record = self.ray.get(result)
        except self.ray.exceptions.RayTaskError as error:  # it raised, which measurements do not
            raise error.cause if isinstance(error.cause, GossamerError) else error from None
        except self.ray.exceptions.RayError as error:
            self.lost[task] = str(error).splitlines()[0]
        else:
            self._take(task, self.work.keep(record))

    def _take(self, task: Task, record: Record) -> None:
        self.done[task] = record
        name, measurement = task
        if measurement is None and record["status"] == "ok":
            self._measure(str(self.study.artifact(name)), record["model"]["fingerprint"])

    def _require_a_node(self) -> None:
        """Raise ClusterError if no node can take a task, which Ray would wait for."""
        most = most_cpus(self.ray)
        if most < self.threads:
            raise ClusterError(
                f"each task takes {self.threads} CPUs, and the largest node of the cluster has {most:g}",
                hint=f"--threads {max(1, int(most))}, or add a larger node",
            )


def _performed(place: Place, records: Path, work: Callable[[], Record]) -> Record:
    """What a task does, on its node, which must see the study's folder."""
    place.take(records)
    return work()


def _made(make: Make, recipe: Recipe, out: Path) -> Record:
    """The record of an artifact, made once nobody else holds its output."""
    deadline = time.monotonic() + SECONDS_OF_A_LOCK
    while True:
        record = make(recipe, out, _silent)
        if not str(record["error"]).startswith("OutputLocked") or time.monotonic() > deadline:
            return record
        time.sleep(1.0)


def _measured(measurement: Measurement, model: str) -> Record:
    (record,) = measurement.run([model], _silent)
    return record


def _silent(label: str, done: int, total: int) -> None:
    pass
