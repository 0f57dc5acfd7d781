"""The models on this machine: those in the hub's cache, and artifacts in folders; and how one of them is removed.

Removing is done by name, file by file. Nothing outside the named model is touched: links are taken away, not followed,
and a folder that holds anything that its manifest does not list is refused. Loads no model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, GossamerError, ModelNotFound, UnsafeCheckpoint
from .atomic import Lock
from .card import FILE_NAME as CARD
from .hub import cache_folder, missing_files
from .manifest import FILE_NAME, read_manifest


@dataclass(frozen=True)
class Model:
    """One model on this machine."""

    name: str
    where: Literal["hub", "folder"]
    path: Path
    nbytes: int
    """On the disk; files that several revisions share count once."""
    base: str | None = None
    recipe: str | None = None
    revisions: tuple[str, ...] = ()
    """Of a hub model: those whose files are there."""
    missing: tuple[str, ...] = ()
    """Files that it needs and has not."""
    problem: str | None = None
    """Why nothing more is known of it."""


def models(folders: Iterable[Path]) -> list[Model]:
    """Models of the hub's cache, then artifacts that are one of these folders or lie in one, by name."""
    found = {
        path.resolve(): artifact(path)
        for folder in folders
        for path in sorted([folder, *_entries(folder)])
        if (path / FILE_NAME).is_file()
    }
    return [*hub_models(), *found.values()]


def hub_models() -> list[Model]:
    """Every model in the hub's cache, by name."""
    cache = cache_folder()
    return [_hub_model(path) for path in sorted(_entries(cache)) if path.name.startswith("models--")]


def artifact(path: Path) -> Model:
    """One artifact folder."""
    try:
        manifest = read_manifest(path)
    except GossamerError as error:
        return Model(str(path), "folder", path, _size(path), problem=error.message)
    assert manifest is not None
    recipe = manifest.recipe.get("name")
    absent = tuple(name for name in sorted(manifest.files) if not os.path.lexists(path / name))
    return Model(str(path), "folder", path, _size(path), manifest.base.name, recipe and str(recipe), missing=absent)


def find(name: str) -> Model:
    """The model of this name that can be removed: an artifact's folder, or a hub id. Raises CheckpointError."""
    path = Path(name)
    if os.path.lexists(path):
        if path.is_symlink() or not path.is_dir():
            raise UnsafeCheckpoint(f"{name}: a {'link' if path.is_symlink() else 'file'}, not a model's folder")
        if not (path / FILE_NAME).is_file():
            raise CheckpointError(f"{name}: not made by Gossamer (no {FILE_NAME})", hint="remove it by other means")
        return artifact(path)
    known = {model.name: model for model in hub_models()}
    if name not in known:
        raise ModelNotFound(f"no model {name!r} on this machine", hint="gossamer ls shows what there is")
    return known[name]


def remove(model: Model) -> None:
    """Remove a model that `find` gave. Raises UnsafeCheckpoint before anything is removed, OutputLocked."""
    if model.where == "hub":
        _remove_hub(model.path)
    else:
        with Lock(model.path):
            _remove_artifact(model.path)


def _remove_artifact(folder: Path) -> None:
    """The files that the manifest lists, the manifest and the card, and then the empty folders."""
    manifest = read_manifest(folder)
    if manifest is None or folder.is_symlink():
        raise UnsafeCheckpoint(f"{folder}: no longer the artifact that it was")
    known = {*manifest.files, FILE_NAME, CARD}
    there, folders = _tree(folder)
    strange = sorted(there - known)
    if strange:
        raise UnsafeCheckpoint(
            f"{folder}: holds {strange[0]!r}, which Gossamer did not write"
            + (f", and {len(strange) - 1} more" if len(strange) > 1 else ""),
            hint="move it elsewhere first",
        )
    for name in sorted(there - {FILE_NAME}):
        (folder / name).unlink()
    (folder / FILE_NAME).unlink()  # the last: what is left of a removal that was cut short is an artifact still
    for name in sorted(folders, key=len, reverse=True):
        (folder / name).rmdir()
    folder.rmdir()


def _remove_hub(folder: Path) -> None:
    """A model's folder in the hub's cache, if it is a real one right in it."""
    cache = cache_folder().resolve()
    if folder.is_symlink() or folder.resolve().parent != cache or not folder.name.startswith("models--"):
        raise UnsafeCheckpoint(f"{folder}: not a folder in the hub's cache, {cache}")
    shutil.rmtree(folder)  # which takes links away, and follows none


def _hub_model(path: Path) -> Model:
    name = path.name.removeprefix("models--").replace("--", "/")
    snapshots = [entry for entry in sorted(_entries(path / "snapshots")) if entry.is_dir()]
    absent = tuple(missing_files(snapshots[-1])) if snapshots else ("every file",)
    found = Model(name, "hub", path, _size(path), revisions=tuple(s.name for s in snapshots), missing=absent)
    ours = next((s for s in snapshots if (s / FILE_NAME).is_file()), None)
    if ours is None:
        return found
    described = artifact(ours)
    return Model(
        name, "hub", path, found.nbytes, described.base, described.recipe, found.revisions, absent, described.problem
    )


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing if it cannot be read."""
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return []


def _tree(folder: Path) -> tuple[set[str], set[str]]:
    """Names of all files and links, and of all folders, below a folder; links are not followed."""
    files: set[str] = set()
    folders: set[str] = set()
    for root, inner, names in os.walk(folder):
        linked = {name for name in inner if os.path.islink(os.path.join(root, name))}
        base = Path(root).relative_to(folder)
        files |= {(base / name).as_posix() for name in (*names, *linked)}
        folders |= {(base / name).as_posix() for name in set(inner) - linked}
    return files, folders


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; a link counts as itself."""
    return sum(os.lstat(folder / name).st_size for name in _tree(folder)[0])
