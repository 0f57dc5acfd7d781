"""What a study asks for, in the order in which it is reported, and what its file of records holds of it already.

Whoever does the work, one thing after another (`study_precision`) or on a cluster (`on_ray`), does what this says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import settings
from ..measure.records import Record, append_record
from ..measure.run import bench_models, evaluate_models
from ..measure.worker import Progress

if TYPE_CHECKING:
    from .study_precision import PrecisionStudy

MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Measurement:
    """Judging models or, with a batch size, timing them."""

    study: PrecisionStudy
    kv_cache: str = "auto"
    """What keys and values are stored as; anything but `auto` is tried on the model itself alone."""
    batch: int | None = None

    @property
    def kind(self) -> str:
        return "eval" if self.batch is None else "bench"

    @property
    def what(self) -> str:
        """In words."""
        cache = "" if self.kv_cache == "auto" else f" with keys and values in {self.kv_cache}"
        return f"eval{cache}" if self.batch is None else f"bench at batch {self.batch}{cache}"

    @property
    def protocol(self) -> dict[str, Any]:
        """What the protocol of its records says."""
        request = self.study.request
        asked: dict[str, Any] = {key: getattr(request, key) for key in ("weights", "backend", "activations")}
        if self.batch is None:
            asked |= {"corpus_sha256": request.corpus.sha256, **asdict(request.plan)}
            asked |= {"tokens": request.tokens, "samples": request.samples}
            asked |= {"reference_fingerprint": self.study.fingerprint}
        else:
            asked |= asdict(replace(self.study.speed, batch=self.batch))
        asked["kv_cache"] = None if self.kv_cache == "auto" else self.kv_cache
        return asked | {"threads": settings.threads() if request.threads is None else request.threads}

    def among(self, models: Mapping[str, str]) -> dict[str, str]:
        """Of these models (and their fingerprints) those that it is asked of."""
        every = self.kv_cache == "auto"
        return {model: known for model, known in models.items() if every or model == self.study.model}

    def run(self, models: Sequence[str], progress: Progress) -> Iterator[Record]:
        """A record for each model, in order."""
        request = self.study.request
        if self.batch is None:
            asked = replace(request, reference=self.study.model, kv_cache=self.kv_cache)
            return evaluate_models(models, asked, progress)
        plan = replace(self.study.speed, batch=self.batch)
        how = request.weights, request.threads, request.backend, request.activations, self.kv_cache
        return bench_models(models, plan, progress, *how)


class Work:
    """All of a study: artifacts to make, then measurements of what could be made."""

    def __init__(self, study: PrecisionStudy) -> None:
        self.study = study
        self.made = [name for name in study.formats if name not in study.kv_caches]
        caches = ["auto", *study.kv_caches.values()]
        self.measurements = [Measurement(study, cache, batch) for cache in caches for batch in (None, *study.batches)]
        self._held = read_lines(study.records)

    def artifact(self, name: str) -> Record | None:
        """The record of this variant's artifact, if it is there and was made just so."""
        recipe, out = self.study.recipe(name), self.study.artifact(name)
        wanted = {"path": str(out), "base_fingerprint": self.study.fingerprint}
        for record in reversed(self._held if out.is_dir() else []):
            made_by = (record.get("protocol") or {}).get("recipe")
            made_here = _is_good(record, "compress") and _says(record.get("model"), wanted)
            if made_here and _asked(made_by) == _asked(recipe.canonical()):
                return record
        return None

    def models(self, made: Mapping[str, Record]) -> dict[str, str]:
        """The models to measure and their fingerprints: the model itself, and the artifacts that could be made."""
        models = {self.study.model: self.study.fingerprint}
        for name in self.made:
            if made[name]["status"] == "ok":
                models[str(self.study.artifact(name))] = made[name]["model"]["fingerprint"]
        return models

    def measured(self, measurement: Measurement, fingerprint: str) -> Record | None:
        """The newest good record that the file holds of this model by this protocol."""
        protocol = measurement.protocol
        for record in reversed(self._held):
            same_model = _says(record.get("model"), {"fingerprint": fingerprint})
            if _is_good(record, measurement.kind) and same_model and _says(record.get("protocol"), protocol):
                return record
        return None

    def keep(self, record: Record) -> Record:
        """Append a record to the file."""
        append_record(self.study.records, record)
        return record


def _is_good(record: Record, kind: str) -> bool:
    return (record.get("kind"), record.get("status")) == (kind, "ok")


def _says(part: Any, wanted: Mapping[str, Any]) -> bool:
    """True if a part of a record has all these values."""
    return isinstance(part, dict) and all(part.get(key) == value for key, value in wanted.items())


def _asked(recipe: Any) -> Any:
    """A recipe as it was before a budget was spent, or ranks were allocated."""
    plain = json.loads(json.dumps(recipe))
    for stage in plain["stages"] if isinstance(plain, dict) else []:
        budget = stage.get("budget")
        if stage.get("allocate"):
            stage["layers"], stage["settled"] = {}, False
        if budget:
            stage["layers"], budget["settled"] = {}, False
            if budget["embedding"]:
                stage["embedding"] = stage["head"] = None
    return plain


def read_lines(path: Path) -> list[Record]:
    """The records of a file, none if there is no file. A line that is no record is passed over: it proves nothing."""
    if not path.is_file():
        return []
    found = []
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if isinstance(record, dict):
                found.append(record)
    return found
