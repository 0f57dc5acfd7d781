"""Every number format on one model, by bytes, speed at several batch sizes, and divergence: as result records.

    each variant: make the artifact -> judge it beside the float model -> time it at every batch size

All formats get the same treatment: the linear layers by one method, the embedding and the head in 8 bits for each row,
so that what differs is the format. Every record is appended to one file as soon as it is there. What the file already
holds of the same artifact by the same protocol is not measured again, but what failed is tried again. Knows no format's
inside: a variant is a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..compress.recipe import Recipe, parse_recipe
from ..errors import UnknownName
from ..measure.plans import SpeedPlan
from ..measure.records import Record
from ..measure.run import EvalRequest
from ..measure.worker import Progress
from .work import Measurement, Work

Make: TypeAlias = Callable[[Recipe, Path, Progress], Record]
"""Make an artifact by a recipe in this folder: its `compress` record, marked failed if it could not be made."""

FLOAT = "float"
"""The variant that is the model itself: what all others are compared with."""
TOGETHER = 4
"""Models that are judged beside one reference, or timed in turns: more would take more memory than they save time."""
ENDS = {"embedding": {"bits": 8, "group_size": "channel"}, "head": {"bits": 8, "group_size": "channel"}}

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
        self.work = Work(study)
        self.where = ""

    def records(self) -> Iterator[Record]:
        made: dict[str, Record] = {}
        for number, name in enumerate(self.work.made, start=1):
            self.where = f"{name}, {number} of {len(self.work.made)}"
            made[name] = self._made(name)
            yield made[name]
        models = self.work.models(made)
        for measurement in self.work.measurements:
            yield from self._measured(measurement, measurement.among(models))

    def progress(self, label: str, done: int, total: int) -> None:
        """What a part of the work says of itself, with where the study is."""
        self.outer(f"{self.where}: {label}", done, total)

    def _made(self, name: str) -> Record:
        held = self.work.artifact(name)
        if held is not None:
            return held
        self.progress("making it", 0, 1)
        return self.work.keep(self.make(self.study.recipe(name), self.study.artifact(name), self.progress))

    def _measured(self, measurement: Measurement, models: Mapping[str, str]) -> Iterator[Record]:
        """A record for each model: the one that the file holds, or a new one, a few models at a time."""
        found = {model: self.work.measured(measurement, known) for model, known in models.items()}
        missing = [model for model, record in found.items() if record is None]
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            self.where = f"{measurement.what}, {start + len(models) - len(missing) + 1} of {len(models)}"
            for model, record in zip(some, measurement.run(some, self.progress), strict=True):
                found[model] = self.work.keep(record)
        yield from (record for record in found.values() if record is not None)
