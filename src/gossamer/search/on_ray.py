"""A study on a Ray cluster: each making, each judgement and each timing is a task of its own.

Tasks only measure. This process alone appends records to the study's file, as they come, so that the same command goes
on where it stopped, with a cluster or without. Artifacts lie where a study without a cluster puts them: all nodes must
see the folder, under the same path. Knows no Ray but what `Tasks` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from .. import settings
from ..cluster.join import joined
from ..cluster.tasks import Tasks
from ..compress.recipe import Recipe
from ..measure.records import Record
from ..measure.worker import Progress
from .study_precision import Make, PrecisionStudy
from .work import Measurement, Work

SECONDS_OF_A_LOCK = 120.0
"""How long the output of a task may stay locked: by what is left of a node that was lost."""

Study = TypeVar("Study", bound=PrecisionStudy)


class Piece(NamedTuple):
    """Making a variant (its name, None), or measuring a model (its name or folder)."""

    model: str
    measurement: Measurement | None

    def __str__(self) -> str:
        return self.model


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
        return _Driver(study, make, progress, Tasks(ray, study.request.threads, study.records)).records()


class _Driver:
    """What runs, what came of it, and what follows."""

    def __init__(self, study: PrecisionStudy, make: Make, progress: Progress, tasks: Tasks) -> None:
        self.study, self.make, self.progress, self.tasks = study, make, progress, tasks
        self.work = Work(study)
        self.done: dict[Piece, Record] = {}

    def records(self) -> list[Record]:
        for name in self.work.made:
            self._take_or_begin(Piece(name, None), self.work.artifact(name))
        self._measure(self.study.model, self.study.fingerprint)
        self._say()
        for piece, record in self.tasks.ended():
            self._take(piece, self.work.keep(record))
            self._say()
        made = {name: self.done[Piece(name, None)] for name in self.work.made}
        models = self.work.models(made)
        measured = [self.done[Piece(model, m)] for m in self.work.measurements for model in m.among(models)]
        return [*made.values(), *measured]

    def _say(self) -> None:
        self.progress("tasks", len(self.done), len(self.done) + len(self.tasks))

    def _measure(self, model: str, fingerprint: str) -> None:
        for measurement in self.work.measurements:
            if model in measurement.among({model: fingerprint}):
                self._take_or_begin(Piece(model, measurement), self.work.measured(measurement, fingerprint))

    def _take_or_begin(self, piece: Piece, held: Record | None) -> None:
        """Take the record that the file holds, or have a node make one."""
        if held is not None:
            self._take(piece, held)
        else:
            self.tasks.begin(piece, self._work(*piece))

    def _work(self, name: str, measurement: Measurement | None) -> Callable[[], Record]:
        if measurement is not None:
            return partial(_measured, measurement, name)
        return partial(_made, self.make, self.study.recipe(name), self.study.artifact(name))

    def _take(self, piece: Piece, record: Record) -> None:
        self.done[piece] = record
        name, measurement = piece
        if measurement is None and record["status"] == "ok":
            self._measure(str(self.study.artifact(name)), record["model"]["fingerprint"])


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
