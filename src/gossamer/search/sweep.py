"""Recipes on one model, each beside the others: made, judged against the model, timed.

    each recipe: make the artifact -> judge it beside the float model -> time it at every batch size

The variants are the user's own recipes, so that it runs, resumes and records as `study_precision` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..compress.recipe import Recipe
from ..errors import UnknownName, UsageError
from .study_precision import PrecisionStudy


@dataclass(frozen=True)
class Sweep(PrecisionStudy):
    """Recipes to compare; `formats` are their names."""

    recipes: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def records(self) -> Path:
        return self.folder / "sweep.jsonl"

    @property
    def kv_caches(self) -> Mapping[str, str]:
        return {}  # a recipe may have any name

    def recipe(self, name: str) -> Recipe:
        if name not in self.recipes:
            raise UnknownName("recipe", name, self.recipes)
        return self.recipes[name]


def by_name(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Name -> recipe. Raises UsageError where two recipes that differ have one name; the same twice is one."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        if found.setdefault(recipe.name, recipe) != recipe:
            raise UsageError(
                f"two different recipes are named {recipe.name!r}: their artifacts would lie in one folder",
                hint="give one of them another name",
            )
    return found
