"""Low rank on one model: the same share of the parameters in every layer, or where the divergence says.

    each ratio, uniform and allocated: make the artifact -> judge it beside the float model

The variants are recipes of one stage, so that it runs, resumes and records as `study_precision` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..compress.recipe import Recipe, parse_recipe
from ..errors import UsageError
from .study_precision import PrecisionStudy

ALLOCATED = "-kld"
"""Ends the name of a variant whose ranks are allocated by divergence."""


@dataclass(frozen=True)
class RankStudy(PrecisionStudy):
    """Shares of the parameters to keep; `formats` are the variants that these make, `method` is what makes them."""

    method: str = "svd-llm"

    def recipe(self, name: str) -> Recipe:
        """The recipe of a variant such as `0.8` or `0.8-kld`. Raises RecipeError."""
        ratio = float(name.removesuffix(ALLOCATED))
        stage = {"method": self.method, "ratio": ratio, "allocate": "kld" if name.endswith(ALLOCATED) else None}
        plain = {"version": 1, "name": name, "calibration": dict(self.calibration), "stages": [stage]}
        return parse_recipe(plain, f"ratio {name} of the study")


def variants(ratios: Sequence[str]) -> tuple[str, ...]:
    """Names of the variants: each share uniform, then allocated. Raises UsageError for what is no share."""
    for ratio in ratios:
        try:
            good = 0 < float(ratio) < 1
        except ValueError:
            good = False
        if not good:
            raise UsageError(f"--ratios {ratio!r:.40} is not a share of the parameters", hint="such as 0.9,0.8,0.7")
    return tuple(name for ratio in dict.fromkeys(ratios) for name in (f"{float(ratio):g}", f"{float(ratio):g}-kld"))
