"""Every error that Gossamer raises on purpose. Nothing in the package stands below this file.

GossamerError                 exit code 1
├── UsageError                exit code 2: the request itself is wrong
│   ├── UnknownName           a command, option, method, alias or recipe that does not exist
│   └── RecipeError           a recipe with an unknown key, a bad value or an illegal order
├── CheckpointError           a model's files
│   ├── ModelNotFound         no such folder, file, alias or hub id
│   ├── UnsafeCheckpoint      pickle, remote code, a path that leaves the folder
│   ├── CorruptCheckpoint     truncated, overlapping, inconsistent
│   └── UnsupportedModel      well-formed, but of a kind that is not implemented
├── TokenizerError            text to tokens and back
│   └── ChatTemplateError     a template that fails, loops or prints without end
├── CompressionError          a recipe meeting a model
│   ├── ShapeMismatch         a group size that does not divide a layer, ...
│   ├── ResumeMismatch        unfinished work of another model, recipe, corpus or seed
│   └── NumericalError        a factorization that no damping rescues, NaN, Inf
├── OutputLocked              two runs on one output
├── OutputExists              an output that would be overwritten
├── DoesNotFit                memory or disk, with the numbers and the way out
├── KernelError               a shape, stride or dtype that a kernel does not take
├── EngineError               a generation request that cannot be served
├── ClusterError              a Ray cluster: no Ray, none there, or none that can do what is asked
└── MeasureError              a measurement that would not mean what it says
    ├── EngineMissing         another engine that is not installed
    └── Contaminated          judged on the text that calibrated or trained it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GossamerError(Exception):
    """Base of all user-facing errors; ``hint`` says the way out, in one sentence."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class UsageError(GossamerError):
    exit_code = 2


class UnknownName(UsageError):
    """A name that does not exist; the nearest ones that do are the hint."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        super().__init__(f"unknown {kind} {name!r}", hint=did_you_mean(name, known))
        self.kind, self.name, self.known = kind, name, known


class RecipeError(UsageError):
    pass


class CheckpointError(GossamerError):
    pass


class ModelNotFound(CheckpointError):
    """No model of this name; ``asked`` is the name as it was given, where one was."""

    exit_code = 2
    asked: str | None = None


class UnsafeCheckpoint(CheckpointError):
    pass


class CorruptCheckpoint(CheckpointError):
    pass


class UnsupportedModel(CheckpointError):
    pass


class TokenizerError(GossamerError):
    pass


class ChatTemplateError(TokenizerError):
    pass


class CompressionError(GossamerError):
    pass


class ShapeMismatch(CompressionError):
    pass


class ResumeMismatch(CompressionError):
    pass


class NumericalError(CompressionError):
    pass


class OutputLocked(GossamerError):
    pass


class OutputExists(GossamerError):
    pass


class DoesNotFit(GossamerError):
    pass


class KernelError(GossamerError):
    pass


class EngineError(GossamerError):
    pass


class ClusterError(GossamerError):
    pass


class ExportError(GossamerError):
    pass


class ProofFailed(ExportError):
    pass


class MeasureError(GossamerError):
    pass


class EngineMissing(MeasureError):
    pass


class Contaminated(MeasureError):
    pass


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The nearest known names as one sentence, or all of them if few and none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    if known and len(known) <= 12:
        return "known: " + ", ".join(known)
    return None
