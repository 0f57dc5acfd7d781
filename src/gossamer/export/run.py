"""One export from start to end: check, write, read back, run; then the output takes its name, or nothing is left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, Lock, Manifest, atomic_folder
from ..checkpoint.atomic import atomic_file
from ..checkpoint.manifest import FILE_NAME, base_of, hash_files, write_manifest
from ..checkpoint.save import versions
from ..errors import DoesNotFit, ExportError, OutputExists
from . import engines, proof
from .base import Export, Options, Progress
from .registry import target_class

NOT_VERIFIED = "not verified"


@dataclass(frozen=True)
class Proving:
    """How an export is proved."""

    verify: bool = True
    """False: nothing is read back, and the manifest says so."""
    engine: bool = True
    """The target's engine is run where it is installed."""
    python: Path | None = None
    """A Python that has the engine; None: ours, if it has it."""


def export(
    checkpoint: Checkpoint, target: str, out: Path, options: Options, proving: Proving, progress: Progress
) -> dict[str, Any]:
    """Export a model, and return what the manifest says of it.

    A folder's manifest is in it; beside a file FILE lies FILE.gossamer.json. Raises ExportError, ProofFailed,
    OutputExists, OutputLocked, DoesNotFit.
    """
    if out.exists():
        raise OutputExists(f"{out} exists already", hint="choose another --out, or remove it first")
    made = target_class(target)(checkpoint, options)
    engine = _engine(made, options, proving)
    with Lock(out), _output(made, out) as folder:
        path = folder / out.name if made.one_file else folder
        made.write(path, progress)
        record: dict[str, Any] = {"target": target, "layout": made.layout, "rounded": sorted(made.rounded)}
        if proving.verify:
            reader = made.reader(path)
            record["weights"] = proof.read_back(made, reader, progress)
            record["engine"] = _run(made, engine, path, proof.ReadBack(checkpoint, reader), progress)
        else:
            record |= {"weights": NOT_VERIFIED, "engine": NOT_VERIFIED}
        _write_manifest(made, folder, path, record)
    return record


@contextlib.contextmanager
def _output(made: Export, out: Path) -> Iterator[Path]:
    with (atomic_file if made.one_file else atomic_folder)(out) as folder:
        yield folder


def _engine(made: Export, options: Options, proving: Proving) -> engines.Engine | None:
    """The target's engine if it is there. Raises ExportError for one that was named and is not, or is not run."""
    if options.llama_cpp is not None and made.engine != "llama.cpp":
        raise ExportError(
            f"{made.target}: no program of llama.cpp is run for it, and {options.llama_cpp} was named",
            hint="leave out --llama-cpp",
        )
    if not (proving.verify and proving.engine) or made.engine is None:
        if proving.python is not None:
            why = "no engine of this target is driven" if made.engine is None else "nothing is run without verifying"
            raise ExportError(
                f"{made.target}: {why}, and {proving.python} was named to run it in", hint="leave out --engine"
            )
        return None
    return engines.find(made.engine, proving.python, options.llama_cpp)


def _run(
    made: Export, engine: engines.Engine | None, path: Path, written: Checkpoint, progress: Progress
) -> dict[str, Any] | str:
    """What the engine's answers say of what was written, or why there are none."""
    if made.engine is None:
        return "no engine of this target is driven"
    if engine is None:
        return f"{made.engine} was not run"
    progress(f"running {engine.name}", 0, 1)
    prompts = proof.prompts_of(written)
    try:
        judged = proof.judge(written, prompts, engine.answer(path, prompts, proof.ANSWER))
    except DoesNotFit as error:
        return f"{made.engine} was not judged: {error.message}"
    progress(f"running {engine.name}", 1, 1)
    return judged


def _write_manifest(made: Export, folder: Path, path: Path, record: dict[str, Any]) -> None:
    checkpoint = made.checkpoint
    if checkpoint.manifest is not None:
        manifest = Manifest.model_validate(checkpoint.manifest)
    else:
        base = base_of(checkpoint.name, checkpoint.fingerprint(), checkpoint.source_note, None)
        manifest = Manifest(base=base, versions=versions())
    update = {"files": hash_files(folder), "results": {**manifest.results, "export": record}}
    write_manifest(folder, manifest.model_copy(update=update))
    if made.one_file:
        (folder / FILE_NAME).rename(path.with_name(f"{path.name}.{FILE_NAME}"))
