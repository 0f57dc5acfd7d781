"""Models from the Hugging Face hub: only weights, configs and tokenizers, never code. Keeps no copy of its own.

Files go to the hub library's cache, and come from there when there is no network or HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import errno
from pathlib import Path

from .. import settings
from ..errors import DoesNotFit, GossamerError, ModelNotFound

SAFE = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
PICKLES = ("pytorch_model*.bin",)
IGNORED = ("*/*", "consolidated*")
"""Other copies of the same weights."""


def download(repository: str, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Folder of a hub model, downloaded unless it is in the cache. Raises ModelNotFound, DoesNotFit."""
    folder = _snapshot(repository, revision, SAFE)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _snapshot(repository, revision, (*SAFE, *PICKLES))
    return folder


def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(IGNORED),
                local_files_only=settings.offline(),
            )
        )
    except Exception as error:  # of the hub, of HTTP, of the system: all end in "no model"
        raise _explained(repository, revision, error) from error


def _explained(repository: str, revision: str | None, error: Exception) -> GossamerError:
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DoesNotFit(f"{repository}: no room for it in the hub's cache", hint="free some space, or set HF_HOME")
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(f"{repository}: access must be granted", hint="accept its terms, then: hf auth login")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(f"{repository}: not on the hub, or private", hint="if it is private: hf auth login")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"{repository}: no revision {revision!r} on the hub")
    if settings.offline():
        return ModelNotFound(
            f"{repository}: not in the hub's cache, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE to download it",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ModelNotFound(
        f"{repository}: cannot be downloaded: {reason}", hint="without a network, name a local folder or .gguf file"
    )
