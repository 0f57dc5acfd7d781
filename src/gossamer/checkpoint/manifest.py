"""gossamer.json: what an artifact is made from, and how to make it again. Knows no tensor.

It holds no date and no machine, so the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import settings
from ..errors import CorruptCheckpoint, UnsupportedModel
from .atomic import write_file
from .files import inside, read_json, stamps

FILE_NAME = "gossamer.json"
SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """The text that statistics were taken from."""

    kind: str
    sha256: str
    sequences: int = Field(ge=0)
    length: int = Field(ge=0)
    seed: int | None = None
    line_hashes: list[str] = []
    """Of each line of the text, so that an evaluation on the same lines is refused."""
    details: dict[str, Any] = {}


class Base(_Strict):
    """The checkpoint that the artifact was made from."""

    name: str
    fingerprint: str
    note: str | None = None
    """What a reader of its numbers must know, such as "stored as Q4_1 (GGUF): already 4-bit"."""
    calibrations: list[Calibration] = []
    """Texts that shaped it already, if it is an artifact itself: what is made from it must not be judged on them."""


class Manifest(_Strict):
    """The content of gossamer.json."""

    schema_version: int = SCHEMA_VERSION
    base: Base
    recipe: dict[str, Any] = {}
    """Empty for a plain conversion."""
    seed: int | None = None
    calibration: Calibration | None = None
    versions: dict[str, str] = {}
    files: dict[str, str] = {}
    """File name -> sha256 of every other file of the folder that must not change."""
    results: dict[str, Any] = {}
    formats: dict[str, Any] = {}
    """What config.json cannot say about how weights are stored."""


def base_of(name: str, fingerprint: str, note: str | None, manifest: Mapping[str, Any] | None) -> Base:
    """The Base that a checkpoint is for what is made from it; a local path becomes its last part."""
    before = Manifest.model_validate(manifest) if manifest else None
    known = [] if before is None else [*before.base.calibrations, *([before.calibration] if before.calibration else [])]
    unique = {calibration.sha256: calibration for calibration in known}
    local = Path(name).resolve().name if os.path.exists(name) else name
    return Base(name=local, fingerprint=fingerprint, note=note, calibrations=list(unique.values()))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write gossamer.json into the folder, the same bytes for the same manifest."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    write_file(folder / FILE_NAME, text.encode() + b"\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's gossamer.json, or None if it has none. Raises CorruptCheckpoint, UnsupportedModel."""
    path = inside(folder, FILE_NAME)
    if not path.is_file():
        return None
    content = read_json(path)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UnsupportedModel(
            f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}", hint="upgrade gossamer"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CorruptCheckpoint(f"{path}: {field}: {first['msg']}") from error


def hash_files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file below the folder but gossamer.json."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE_NAME)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare the listed files with their hashes. Raises CorruptCheckpoint naming the first that differs or is absent.

    A file that has not changed since it was last compared is not read again.
    """
    for name, expected in sorted(manifest.files.items()):
        path = inside(folder, name)
        if not path.is_file():
            raise CorruptCheckpoint(f"{folder}: {name} is missing, {FILE_NAME} lists it")
        found = cached_hash("sha256", [path], lambda path=path: sha256(path))
        if found != expected:
            raise CorruptCheckpoint(
                f"{path}: changed since it was written: sha256 {found[:16]}..., {FILE_NAME} says {expected[:16]}..."
            )


def sha256(path: Path) -> str:
    """sha256 of a file, read in bounded pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_hash(kind: str, paths: list[Path], compute: Any) -> str:
    """`compute()`, remembered in the cache for as long as all these files keep their `stamps`."""
    key = hashlib.sha256(json.dumps([kind, stamps(paths)]).encode()).hexdigest()
    try:
        entry = settings.cache_dir("fingerprints") / key
        value = entry.read_text() if entry.is_file() else ""
        if len(value) == 64 and set(value) <= set("0123456789abcdef"):
            return value
    except (OSError, UnicodeDecodeError):  # a cache that cannot be used costs time, not the result
        return str(compute())
    computed = str(compute())
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}")
    try:
        temporary.write_text(computed)
        temporary.replace(entry)
    except OSError:
        pass
    return computed
