"""Runs a recipe over a checkpoint: bounded memory, durable progress, whole output or none.

    lock -> is it there? does it fit? -> calibration -> journal -> units, each computed, written, recorded -> rename

Transforms give another view of the checkpoint before all else, the quantizer makes the units of embedding, head and
blocks (`blocks.py`), each tuner one more (`tuning.py`), and `assembly.py` puts the output together. A run that was
killed and resumed gives the same bytes as one that was not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.atomic import Lock
from ..checkpoint.manifest import read_manifest
from ..checkpoint.memory import available_memory
from ..errors import CompressionError, OutputExists, ResumeMismatch, UsageError
from .assembly import CALIBRATION_FILE, assemble, versions
from .blocks import make_units
from .calibration import Calibration
from .journal import Journal, differences, discard, require_same
from .method import Needs
from .plan import Plan, check_fit, free_disk, make_plan
from .recipe import Recipe
from .sensitivity import settle
from .source import Source
from .tuning import tune
from .units import Units

__all__ = ["CALIBRATION_FILE", "Later", "Result", "compress", "transformed", "versions"]

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


@dataclass(frozen=True)
class Later:
    """A calibration that is made only if it is needed, after every check that does not need it."""

    make: Callable[[], Calibration]
    memory: int = 0
    """Bytes that making it takes."""


@dataclass(frozen=True)
class Result:
    """Where the artifact is, and what each layer lost."""

    path: Path
    layers: list[dict[str, Any]]
    """One entry per weight: block, linear, format, bits_per_weight, relative_error."""
    error_kind: str
    """`output`: error of the layer's output over the calibration inputs; `weight`: of the weight itself."""
    resumed: int
    """Units that an earlier run had finished."""
    existed: bool
    """The very same artifact was there already; nothing was done."""


def compress(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    calibration: Calibration | Later | None = None,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> Result:
    """Make `out` from a checkpoint by a recipe; a killed run is resumed by the same call.

    Raises OutputLocked, OutputExists, DoesNotFit and ResumeMismatch before any work; UsageError if the recipe needs a
    calibration and none is given; ShapeMismatch, CompressionError, NumericalError.
    """
    progress, out = progress or (lambda *_: None), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Lock(out):  # before a budget is settled, which may take minutes: of two runs, one is told at once
        recipe, text = settle(transformed(checkpoint, recipe), recipe, calibration, progress)
        text = cast("Calibration | Later | None", text)
        return _Run(checkpoint, recipe, out, text, progress).run(overwrite, restart)


def transformed(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint as the quantizer of this recipe sees it; nothing is computed before it is read."""
    for transform in recipe.transforms():
        checkpoint = transform.apply(checkpoint)
    return checkpoint


class _Run:
    """One run's fixed facts, and the steps that use them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        out: Path,
        calibration: Calibration | Later | None,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.recipe, self.out, self.progress = checkpoint, recipe, out, progress
        self.source = Source(transformed(checkpoint, recipe))
        self.method = recipe.quantizer()
        if not recipe.needs_calibration():
            calibration = None
        elif calibration is None:
            hungry = [m.name for m in recipe.methods() if m.needs is not Needs.NOTHING] or ["a budget"]
            raise UsageError(f"{hungry[0]} needs calibration tokens", hint="see compress.calibration.calibrate")
        self.later = calibration if isinstance(calibration, Later) else None
        self.calibration = None if isinstance(calibration, Later) else calibration
        self.plan: Plan = make_plan(
            self.source.config,
            recipe,
            self.source.checkpoint.dtype,
            sampling_bytes=self.later.memory if self.later else 0,
        )
        self.work = out.parent / f".{out.name}.work"
        self.replaced = self.work / "replaced"
        """Where an artifact that is overwritten waits until the new one has its name."""

    def run(self, overwrite: bool, restart: bool) -> Result:
        """Everything, by whoever holds the output's lock."""
        self._bring_back()
        existing = self._existing(overwrite)
        if existing is not None:
            return existing
        if restart:
            discard(self.work)
        require_same(self.work, self._header())
        check_fit(
            self.plan,
            available_memory(),
            free_disk(self.out) + _bytes_below(self.work),
            self.recipe.needs_calibration(),
        )
        self._calibrate()
        journal = Journal(self.work, self._header())
        resumed = len(journal.done)
        units = Units(self.work, journal, self.source, self.plan, len(self.recipe.tuners()))
        self._make(units)
        layers = [note for unit in units.names() for note in units.notes(unit)["layers"]]
        self._assemble(units, layers)
        discard(self.work)
        return Result(self.out, layers, self._error_kind(), resumed, existed=False)

    def _make(self, units: Units) -> None:
        """Every unit that is not done yet."""
        tokens, seed = None if self.calibration is None else self.calibration.tokens, self.recipe.calibration.seed
        make_units(units, self.method, tokens, self.progress, seed)
        for stage, tuner in enumerate(self.recipe.tuners()):
            if not units.is_done(units.tuned[stage]):
                assert tokens is not None
                tune(units, stage, tuner, Source(self.checkpoint), tokens, self.progress, seed)

    def _assemble(self, units: Units, layers: list[dict[str, Any]]) -> None:
        results = {"layers": layers, "error_kind": self._error_kind()}
        assemble(self.out, self.replaced, units, self.recipe, self.checkpoint, self.calibration, results, self.progress)

    def _error_kind(self) -> str:
        return "weight" if self.method.needs is Needs.NOTHING else "output"

    def _calibrate(self) -> None:
        """Have the tokens, and refuse any that are not this model's. Raises what making them raises."""
        if self.later is not None and self.calibration is None:
            self.calibration = self.later.make()
        if self.calibration is None:
            return
        tokens, size = self.calibration.tokens, self.source.config.vocab_size
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise CompressionError(
                f"calibration tokens from {int(tokens.min())} to {int(tokens.max())} are not of this model, "
                f"whose vocabulary has {size}",
                hint="give --calibration self, or a text file",
            )

    def _header(self) -> dict[str, Any]:
        """All that decides the output's bytes; the calibration comes last, and only when it is known."""
        header = {
            "model": self.checkpoint.fingerprint(),
            "recipe": self.recipe.canonical(),
            "gossamer": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        if self.calibration is not None:
            header["calibration"] = self.calibration.record["sha256"]
        return header

    def _bring_back(self) -> None:
        """An artifact whose replacement was killed between the two renames gets its name again; after them it goes."""
        if self.replaced.exists() and self.out.exists():
            shutil.rmtree(self.replaced)
        elif self.replaced.exists():
            self.replaced.rename(self.out)

    def _existing(self, overwrite: bool) -> Result | None:
        """The finished artifact if it is just what was asked for. Raises OutputExists if it is something else."""
        if not self.out.exists():
            return None
        if self.out.resolve() == self.checkpoint.path.resolve():
            raise OutputExists(f"{self.out} is the model that is read", hint="choose another --out")
        manifest = read_manifest(self.out) if self.out.is_dir() else None
        if manifest is None:
            raise OutputExists(f"{self.out} exists and is not an artifact of ours", hint="choose another --out")
        if overwrite:
            return None
        self._require_made_alike({"model": manifest.base.fingerprint, "recipe": manifest.recipe})
        if manifest.calibration is not None:
            if manifest.calibration.kind != "self":  # model and recipe, its seed included, say what a model samples
                self._calibrate()
            if self.calibration is not None:
                self._require_made_alike({"calibration": manifest.calibration.sha256})
        self._sweep()
        return Result(self.out, manifest.results["layers"], self._error_kind(), 0, existed=True)

    def _require_made_alike(self, was: dict[str, Any]) -> None:
        header = self._header()
        for path, old, new in differences(was, {key: header[key] for key in was}):
            raise OutputExists(
                f"{self.out} exists, made differently: {path} was {old!r}, is now {new!r}",
                hint="choose another --out, or give --overwrite",
            )

    def _sweep(self) -> None:
        """Remove what a run of this very artifact left when it was killed at its end; other work is not ours to end."""
        try:
            require_same(self.work, self._header())
        except ResumeMismatch:
            return
        discard(self.work)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
