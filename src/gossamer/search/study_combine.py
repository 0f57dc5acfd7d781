"""Every pair of compressions on one model, one behind the other: which add up, which help each other, which hurt.

    each stage alone, each legal pair in each order: make the artifact -> judge it beside the float model

The variants of a study are recipes of one or two stages, so that it runs, resumes and records as `study_precision`
does. A pair that the recipe refuses is not a gap: the reason stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from ..compress.recipe import Recipe, parse_recipe
from ..errors import RecipeError, UnknownName
from .study_precision import PrecisionStudy

THEN = "-then-"
"""Between the names of two stages in the name of their variant."""

STAGES: dict[str, dict[str, Any]] = {
    "rotate": {"method": "rotate"},
    "flap": {"method": "flap", "ratio": 0.2},
    "depth": {"method": "depth", "ratio": 0.1},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "recover-local": {"method": "recover-local"},
    "svd-llm": {"method": "svd-llm", "ratio": 0.8},
    "int8": {"method": "gptq", "bits": 8, "group_size": "auto"},
    "int4": {"method": "gptq", "bits": 4, "group_size": "auto"},
    "int3": {"method": "gptq", "bits": 3, "group_size": "auto"},
    "scales": {"method": "scales"},
}
"""Name of a stage -> the stage."""


@dataclass(frozen=True)
class CombineStudy(PrecisionStudy):
    """Stages to combine, two at a time; `formats` are the variants that this makes."""

    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: STAGES)

    def recipe(self, name: str) -> Recipe:
        """The recipe of a variant: one stage, or two in their order. Raises UnknownName, RecipeError."""
        return _recipe(name.split(THEN), self.stages, self.calibration)


def variants(
    names: Sequence[str], stages: Mapping[str, Mapping[str, Any]], calibration: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """Variants that a recipe may name, stages alone before pairs; and those that it refuses, with its reason.

    Raises UnknownName with the nearest stages.
    """
    made, refused = [], {}
    for parts in [(name,) for name in names] + list(permutations(names, 2)):
        try:
            _recipe(parts, stages, calibration)
            made.append(THEN.join(parts))
        except RecipeError as error:
            refused[THEN.join(parts)] = error.message.partition(": ")[2]
    return made, refused


def _recipe(parts: Sequence[str], stages: Mapping[str, Mapping[str, Any]], calibration: Mapping[str, Any]) -> Recipe:
    for part in parts:
        if part not in stages:
            raise UnknownName("stage", part, stages)
    listed = [dict(stages[part]) for part in parts]
    plain = {"version": 1, "name": THEN.join(parts), "calibration": dict(calibration), "stages": listed}
    return parse_recipe(plain, f"stages {' and '.join(parts)}")
