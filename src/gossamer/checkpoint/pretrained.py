"""Open, save and publish a model from Python: the three verbs that users of the hub know.

model = gossamer.from_pretrained("org/name")
gossamer.save_pretrained(model, "folder", results="runs/eval.jsonl")
gossamer.push_to_hub("folder", "me/name")
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, UsageError
from .base import Checkpoint
from .card import FILE_NAME as CARD
from .card import records_of, write_card
from .hub import upload
from .manifest import FILE_NAME, Manifest, read_manifest, verify_files
from .open import open_checkpoint
from .save import save_folder


def from_pretrained(name: str | Path, *, revision: str | None = None) -> Checkpoint:
    """A model by folder, .gguf file, alias or hub id; `gossamer.LLM` runs it. Raises as `open_checkpoint`."""
    if revision is None:
        return open_checkpoint(name)
    if Path(name).exists() or "@" in str(name):
        raise UsageError(f"{name}: a revision is for a hub id that names none itself")
    return open_checkpoint(f"{name}@{revision}")


def save_pretrained(model: Checkpoint, folder: str | Path, *, results: str | Path | None = None) -> Path:
    """Write a model as a folder with its card; `results`: .jsonl whose records of this model the card shows.

    Raises OutputExists, OutputLocked, DoesNotFit; UsageError where the file has no such record.
    """
    records = [] if results is None else records_of(Path(results), [model.fingerprint()])
    out = save_folder(model, folder)
    write_card(out, _manifest_of(out), records)
    return out


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    results: str | Path | None = None,
) -> str:
    """Upload an artifact, whole and unchanged since it was written, with its card; returns the address.

    Only files that its manifest lists go, so nothing that lies beside them is published by mistake. Raises
    CheckpointError (no artifact, or one that has changed), UsageError (offline, no right to the repository).
    """
    folder = Path(folder)
    manifest = _manifest_of(folder)
    verify_files(folder, manifest)
    if results is not None or not (folder / CARD).is_file():
        records = [] if results is None else records_of(Path(results), [open_checkpoint(folder).fingerprint()])
        write_card(folder, manifest, records)
    files = sorted({*manifest.files, FILE_NAME, CARD})
    return upload(folder, files, repository, private=private, revision=revision, token=token)


def _manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise CheckpointError(
            f"{folder}: no artifact (it has no {FILE_NAME})", hint="gossamer compress or convert makes one"
        )
    return manifest
