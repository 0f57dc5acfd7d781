"""Runs a recipe over a checkpoint: bounded memory, durable progress, whole output or none.

    lock -> is it there? does it fit? -> calibration -> journal -> units, each computed, written, recorded -> rename

A recipe has parts, each of which makes a model folder out of the one before; only the last one's is the output. In a
part, transforms give another view of the checkpoint, a reducer's decision a smaller one, any other main stage makes the
units of embedding, head and blocks (`blocks.py`), each tuner one more (`tuning.py`), and `assembly.py` puts the folder
together. A run that was killed and resumed gives the same bytes as one that was not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.atomic import Lock
from ..checkpoint.journal import Journal, differences, discard, require_same
from ..checkpoint.manifest import read_manifest
from ..checkpoint.memory import available_memory
from ..errors import CompressionError, OutputExists, ResumeMismatch, UsageError
from ..formats import Format
from .assembly import CALIBRATION_FILE, assemble, versions, write_student
from .blocks import Teacher, make_units
from .calibration import Calibration
from .elsewhere import BlockWork, Elsewhere, Spread
from .factorize.allocation import settle_ranks
from .method import Needs, Reducer
from .plan import check_fit, free_disk, make_plan, plan_part
from .prune.owl import settle_sparsity
from .recipe import Part, Recipe
from .sensitivity import settle
from .source import Source
from .tuning import tune
from .units import DECISION, Units

__all__ = ["CALIBRATION_FILE", "Later", "Result", "compress", "transformed", "versions"]

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""
Sample = Callable[[Path, int, int, int], Tensor]
"""(model folder, sequences, length, seed) -> tokens [sequences, length] that this model writes at temperature 1."""


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
    sample: Sample | None = None,
    spread: Spread | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> Result:
    """Make `out` from a checkpoint by a recipe; a killed run is resumed by the same call.

    `spread` has the blocks of independent parts made by other processes, which see the model and the folder of `out`.
    Raises OutputLocked, OutputExists, DoesNotFit and ResumeMismatch before any work; UsageError if the recipe needs a
    calibration or samples of the model in training and none are given; ShapeMismatch, CompressionError, NumericalError.
    """
    progress, out = progress or (lambda *_: None), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Lock(out):  # before a budget is settled, which may take minutes: of two runs, one is told at once
        view = transformed(checkpoint, recipe)
        recipe, text = settle_ranks(view, *settle(view, recipe, calibration, progress), progress)
        recipe, text = settle_sparsity(view, recipe, text, progress)
        text = cast("Calibration | Later | None", text)
        return _Run(checkpoint, recipe, out, text, progress, sample, spread).run(overwrite, restart)


def transformed(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint as the first main stage of this recipe sees it; nothing is computed before it is read."""
    return recipe.parts()[0].view(checkpoint)


class _Run:
    """One run's fixed facts, and the steps that use them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        out: Path,
        calibration: Calibration | Later | None,
        progress: Progress,
        sample: Sample | None,
        spread: Spread | None,
    ) -> None:
        self.checkpoint, self.recipe, self.out, self.progress = checkpoint, recipe, out, progress
        self.parts, self.sample, self.spread = recipe.parts(), sample, spread
        writers = [t.name for part in self.parts for t in part.tuners if t.samples]
        if writers and sample is None:
            raise UsageError(f"{writers[0]} learns from what the model in training writes, which needs an engine")
        if not recipe.needs_calibration():
            calibration = None
        elif calibration is None:
            hungry = [m.name for m in recipe.methods() if m.needs is not Needs.NOTHING] or ["a budget"]
            raise UsageError(f"{hungry[0]} needs calibration tokens", hint="see compress.calibration.calibrate")
        self.later = calibration if isinstance(calibration, Later) else None
        self.calibration = None if isinstance(calibration, Later) else calibration
        sampling = self.later.memory if self.later else 0
        self.plan = make_plan(transformed(checkpoint, recipe).config, recipe, checkpoint.dtype, sampling)
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
        Journal(self.work, self._header())  # from here on the work folder is this run's
        layers, resumed = self._make()
        discard(self.work)
        return Result(self.out, layers, self._error_kind(), resumed, existed=False)

    def _make(self) -> tuple[list[dict[str, Any]], int]:
        """Part after part, to the output; returns the notes of its layers, and how many units were done before."""
        given, before, layers, resumed = self.checkpoint, dict[str, Format](), list[dict[str, Any]](), 0
        teacher: Teacher | None = Teacher(Source(given), range(given.config.num_layers))
        for n, part in enumerate(self.parts):
            last = part is self.parts[-1]
            folder = self.work if last else self.work / f"part-{n}"
            journal = Journal(folder, self._header())
            resumed += len(journal.done)
            teacher = teacher if all(t.keeps_stream for t in part.transforms) else None
            units, teacher = self._units(folder, journal, part, given, before, teacher)
            done = filter(units.is_done, units.names())
            layers = [note for unit in done for note in units.notes(unit).get("layers", ())] or layers
            if last:
                self._assemble(self.out, self.replaced, units, layers)
            elif not (made := self.work / f"made-{n}").exists():
                self._assemble(made, folder / "replaced", units, layers)
            if not last:
                given, before = open_checkpoint(str(self.work / f"made-{n}")), units.plan.formats
        return layers, resumed

    def _units(
        self,
        folder: Path,
        journal: Journal,
        part: Part,
        given: Checkpoint,
        before: Mapping[str, Format],
        teacher: Teacher | None,
    ) -> tuple[Units, Teacher | None]:
        """Every unit of a part, done; and the teacher of the parts behind it."""
        tokens, seed = None if self.calibration is None else self.calibration.tokens, self.recipe.calibration.seed
        text = self.recipe.calibration

        def units_over(view: Checkpoint) -> Units:
            plan = plan_part(view.config, before, part, text, given.dtype)
            return Units(folder, journal, Source(view), plan, len(part.tuners))

        units = units_over(part.view(given))
        read = None if tokens is None else tokens[: part.main.sequences]
        if isinstance(part.main, Reducer):
            view, teacher = self._reduced(part.main, units, read, teacher)
            units = units_over(view)
        else:
            make_units(units, part.main, read, self.progress, seed, teacher, self._elsewhere(units, part, given))
        for stage, tuner in enumerate(part.tuners):
            if not units.is_done(units.tuned[stage]):
                assert tokens is not None
                sampler = partial(self._sampled, units)
                tune(units, stage, tuner, Source(self.checkpoint), tokens, self.progress, seed, sampler)
        return units, teacher

    def _elsewhere(self, units: Units, part: Part, given: Checkpoint) -> Elsewhere | None:
        """Other processes for the blocks of a part, if there are any and its blocks do not wait for each other."""
        if self.spread is None or not part.independent:
            return None
        seed, threads = self.recipe.calibration.seed, torch.get_num_threads()
        model, folder = given.path.absolute(), units.folder.absolute()
        work = BlockWork(model, given.fingerprint(), part, units.plan, seed, threads, folder)
        return Elsewhere(self.spread, work)

    def _sampled(self, units: Units, trained: Mapping[str, Tensor], sequences: int, length: int, seed: int) -> Tensor:
        """Tokens that a model in training writes: the engine reads it from a folder, as any other."""
        assert self.sample is not None
        folder = self.work / "student"
        write_student(folder, units, self.checkpoint, trained)
        return self.sample(folder, sequences, length, seed)

    def _reduced(
        self, reducer: Reducer, units: Units, tokens: Tensor | None, teacher: Teacher | None
    ) -> tuple[Checkpoint, Teacher | None]:
        """A smaller view by what the reducer has decided, or decides now; and its teacher."""
        if not units.is_done(DECISION):
            units.write(DECISION, reducer.decide(units, tokens, self.progress), {})
        file = units.open(DECISION)
        decision = {name: file.read(name) for name in file.names()}
        kept = reducer.layers_kept(decision, units.source.config.num_layers)
        if teacher is not None:
            teacher = Teacher(teacher.source, [teacher.layers[i] for i in kept]) if reducer.keeps_stream else None
        return reducer.apply(units.source.checkpoint, decision), teacher

    def _assemble(self, out: Path, replaced: Path, units: Units, layers: list[dict[str, Any]]) -> None:
        results = {"layers": layers, "error_kind": self._error_kind()}
        assemble(out, replaced, units, self.recipe, self.checkpoint, self.calibration, results, self.progress)

    def _error_kind(self) -> str:
        return "weight" if self.parts[-1].main.needs is Needs.NOTHING else "output"

    def _calibrate(self) -> None:
        """Have the tokens, and refuse any that are not this model's. Raises what making them raises."""
        if self.later is not None and self.calibration is None:
            self.calibration = self.later.make()
        if self.calibration is None:
            return
        tokens, size = self.calibration.tokens, self.checkpoint.config.vocab_size
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
