"""Every number format on one model, by bytes, speed at several batch sizes, and divergence: as result records.

    each variant: make the artifact -> judge it beside the float model -> time it at every batch size

All formats get the same treatment: the linear layers by one method, the embedding and the head in 8 bits for each row,
so that what differs is the format. Every record is appended to one file as soon as it is there. What the file already
holds of the same artifact by the same protocol is not measured again, but what failed is tried again. Knows no format's
inside: a variant is a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from .. import settings
from ..compress.recipe import Recipe, parse_recipe
from ..errors import UnknownName
from ..measure.plans import SpeedPlan
from ..measure.records import Record, append_record
from ..measure.run import EvalRequest, bench_models, evaluate_models
from ..measure.worker import Progress

Make: TypeAlias = Callable[[Recipe, Path, Progress], Record]
"""Make an artifact by a recipe in this folder: its `compress` record, marked failed if it could not be made."""

FLOAT = "float"
"""The variant that is the model itself: what all others are compared with."""
TOGETHER = 4
"""Models that are judged beside one reference, or timed in turns: more would take more memory than they save time."""
ENDS = {"embedding": {"bits": 8, "group_size": "channel"}, "head": {"bits": 8, "group_size": "channel"}}
MAX_LINE_BYTES = 16 << 20

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "group_size": "channel"},
    "fp8": {"format": "fp8"},
    "int6": {"bits": 6, "group_size": "auto"},
    "int5": {"bits": 5, "group_size": "auto"},
    "int4": {"bits": 4, "group_size": "auto"},
    "nf4": {"format": "nf4", "group_size": "auto"},
    "nf4-dq": {"format": "nf4", "group_size": "auto", "double_quant": True},
    "fp4": {"format": "fp4", "group_size": "auto"},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4"},
    "squeezellm-4": {"method": "squeezellm", "bits": 4},
    "squeezellm-3": {"method": "squeezellm", "bits": 3},
    "mixed-4.5": {
        "bits": 4,
        "group_size": "auto",
        "budget": {"bits": 4.5, "embedding": [{"bits": bits, "group_size": "auto"} for bits in (4, 5, 6, 8)]},
    },
    "int3": {"bits": 3, "group_size": "auto"},
    "int2": {"bits": 2, "group_size": 32, "symmetric": False},
}
"""Name of a variant -> what its stage says besides the method of the study."""
KV_CACHES = {"kv-int8": "int8", "kv-int4": "int4"}
"""Name of a variant that is the model itself -> what its keys and values are stored as."""
VARIANTS = (*FORMATS, *KV_CACHES)


@dataclass(frozen=True)
class PrecisionStudy:
    """What to compare, where the results go, and how they are measured."""

    model: str
    """As the user named it: the reference, and the first variant."""
    fingerprint: str
    """Of the model."""
    folder: Path
    request: EvalRequest
    """How quality is judged; its reference is the model."""
    speed: SpeedPlan
    """How speed is measured, but for the batch size."""
    batches: tuple[int, ...] = (1, 8, 64)
    formats: tuple[str, ...] = VARIANTS
    method: str = "gptq"
    """By which method the formats are made that do not bring their own."""
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> Path:
        """The file of all records."""
        return self.folder / "study.jsonl"

    @property
    def kv_caches(self) -> Mapping[str, str]:
        """Of `formats` those that are the model itself -> what its keys and values are stored as."""
        return {name: KV_CACHES[name] for name in self.formats if name in KV_CACHES}

    def artifact(self, name: str) -> Path:
        """Where a variant's artifact is."""
        return self.folder / "models" / name

    def recipe(self, name: str) -> Recipe:
        """The recipe of a variant. Raises UnknownName, RecipeError."""
        return variant_recipe(name, self.method, self.calibration)


def variant_recipe(name: str, method: str, calibration: Mapping[str, Any]) -> Recipe:
    """The recipe of a variant made by `method`. Raises UnknownName with the nearest ones, RecipeError."""
    if name not in FORMATS:
        raise UnknownName("format", name, VARIANTS)
    ends = {} if "embedding" in FORMATS[name].get("budget", {}) else ENDS
    stage = {"method": method, **ends, **FORMATS[name]}
    if stage["method"] == "rtn":
        stage["clip"] = "mse"
    plain = {"version": 1, "name": name, "calibration": dict(calibration), "stages": [stage]}
    return parse_recipe(plain, f"format {name} of the study")


def run_study(study: PrecisionStudy, make: Make, progress: Progress) -> list[Record]:
    """All records of the study, measured now or before: all makings, then judgements and timings.

    A variant that could not be made, judged or timed has a record marked failed, and the others go on.
    """
    return list(_Run(study, make, progress).records())


class _Run:
    """One pass over all that a study asks for."""

    def __init__(self, study: PrecisionStudy, make: Make, progress: Progress) -> None:
        self.study, self.make, self.outer = study, make, progress
        self.known = read_lines(study.records)
        self.where = ""

    def records(self) -> Iterator[Record]:
        models = {self.study.model: self.study.fingerprint}
        made = [name for name in self.study.formats if name not in self.study.kv_caches]
        caches = ["auto", *self.study.kv_caches.values()]
        for number, name in enumerate(made, start=1):
            self.where = f"{name}, {number} of {len(made)}"
            record = self._made(name)
            if record["status"] == "ok":
                models[str(self.study.artifact(name))] = record["model"]["fingerprint"]
            yield record
        itself = {self.study.model: self.study.fingerprint}
        for cache in caches:
            some = models if cache == "auto" else itself
            yield from self._judged(some, cache)
            for batch in self.study.batches:
                yield from self._timed(some, batch, cache)

    def progress(self, label: str, done: int, total: int) -> None:
        """What a part of the work says of itself, with where the study is."""
        self.outer(f"{self.where}: {label}", done, total)

    def _made(self, name: str) -> Record:
        recipe, out = self.study.recipe(name), self.study.artifact(name)
        for record in reversed(self.known):
            if _is_good(record, "compress") and out.is_dir() and self._made_alike(record, recipe, out):
                return record
        self.progress("making it", 0, 1)
        return self._keep(self.make(recipe, out, self.progress))

    def _made_alike(self, record: Record, recipe: Recipe, out: Path) -> bool:
        wanted = {"path": str(out), "base_fingerprint": self.study.fingerprint}
        made_by = (record.get("protocol") or {}).get("recipe")
        return _says(record.get("model"), wanted) and _asked(made_by) == _asked(recipe.canonical())

    def _judged(self, models: Mapping[str, str], kv_cache: str) -> Iterator[Record]:
        request = replace(self.study.request, reference=self.study.model, kv_cache=kv_cache)
        asked = {
            "corpus_sha256": request.corpus.sha256,
            **asdict(request.plan),
            "reference_fingerprint": self.study.fingerprint,
            **{key: getattr(request, key) for key in ("tokens", "samples", "weights", "backend", "activations")},
            "kv_cache": None if kv_cache == "auto" else kv_cache,
        }

        def judge(some: Sequence[str]) -> Iterator[Record]:
            return evaluate_models(some, request, self.progress)

        yield from self._measured(f"eval{_with(kv_cache)}", models, asked, judge)

    def _timed(self, models: Mapping[str, str], batch: int, kv_cache: str) -> Iterator[Record]:
        request, plan = self.study.request, replace(self.study.speed, batch=batch)
        asked = {**asdict(plan), **{key: getattr(request, key) for key in ("weights", "backend", "activations")}}
        asked["kv_cache"] = None if kv_cache == "auto" else kv_cache

        def bench(some: Sequence[str]) -> Iterator[Record]:
            how = request.weights, request.threads, request.backend, request.activations, kv_cache
            return bench_models(some, plan, self.progress, *how)

        yield from self._measured(f"bench at batch {batch}{_with(kv_cache)}", models, asked, bench)

    def _measured(
        self,
        what: str,
        models: Mapping[str, str],
        asked: Mapping[str, Any],
        measure: Callable[[Sequence[str]], Iterable[Record]],
    ) -> Iterator[Record]:
        """A record for each model: the one that the file holds, or a new one, a few models at a time."""
        threads = settings.threads() if self.study.request.threads is None else self.study.request.threads
        protocol = {**asked, "threads": threads}
        found = {model: self._known(what.split()[0], known, protocol) for model, known in models.items()}
        missing = [model for model, record in found.items() if record is None]
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            self.where = f"{what}, {start + len(models) - len(missing) + 1} of {len(models)}"
            for model, record in zip(some, measure(some), strict=True):
                found[model] = self._keep(record)
        yield from (record for record in found.values() if record is not None)

    def _known(self, kind: str, fingerprint: str, protocol: Mapping[str, Any]) -> Record | None:
        """The newest good record that the file holds of this model by this protocol."""
        for record in reversed(self.known):
            same_model = _says(record.get("model"), {"fingerprint": fingerprint})
            if _is_good(record, kind) and same_model and _says(record.get("protocol"), protocol):
                return record
        return None

    def _keep(self, record: Record) -> Record:
        append_record(self.study.records, record)
        return record


def _with(kv_cache: str) -> str:
    return "" if kv_cache == "auto" else f" with keys and values in {kv_cache}"


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
