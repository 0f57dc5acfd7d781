"""Models from and to the Hugging Face hub: only weights, configs and tokenizers, never code. Keeps no copy of its own.

Files go to the hub library's cache, and come from there when there is no network or HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from .. import settings
from ..errors import CheckpointError, DoesNotFit, GossamerError, ModelNotFound, UsageError
from .files import read_json

SAFE = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
PICKLES = ("pytorch_model*.bin",)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
IGNORED = ("*/*", "consolidated*")
"""Other copies of the same weights."""


def download(repository: str, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Folder of a hub model, downloaded unless it is in the cache. Raises ModelNotFound, DoesNotFit."""
    folder = _snapshot(repository, revision, SAFE)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _snapshot(repository, revision, (*SAFE, *PICKLES))
    if settings.offline() and (absent := missing_files(folder)):
        raise ModelNotFound(
            f"{repository}: in the hub's cache without {', '.join(absent[:5])}"
            + (f" and {len(absent) - 5} more" if len(absent) > 5 else ""),
            hint=f"with a network: HF_HUB_OFFLINE= gossamer pull {repository}",
        )
    return folder


def missing_files(folder: Path) -> list[str]:
    """Files that a model's folder needs and has not: its config, a tokenizer, weights and each shard of them."""
    if any(folder.glob("*.gguf")) or any(folder.glob(PICKLES[0])):
        return []
    absent = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        absent.append(TOKENIZERS[0])
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (CheckpointError, KeyError, AttributeError):
            shards = []  # whoever opens it says what is wrong with it
        return absent + [name for name in shards if not (folder / name).is_file()]
    return absent if any(folder.glob("*.safetensors")) else [*absent, "model.safetensors"]


def cache_folder() -> Path:
    """Where the hub's library keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def upload(
    folder: Path, files: Sequence[str], repository: str, *, private: bool, revision: str | None, token: str | None
) -> str:
    """Put these files of a folder into a repository, made if it is not there, in one commit; its address.

    Raises UsageError: offline, no right to it.
    """
    from huggingface_hub import HfApi

    if settings.offline():
        raise UsageError(f"{repository}: nothing can be sent while HF_HUB_OFFLINE is set", hint="unset it")
    api = HfApi(token=token)
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[escape(name) for name in files],
            revision=revision,
            commit_message="Upload with gossamer",
        )
    except Exception as error:  # of the hub, of HTTP, of the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"{repository}: cannot be sent: {reason}", hint="hf auth login, or give a token") from error
    return url


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
        at = "" if revision is None else f" at revision {revision}"
        return ModelNotFound(
            f"{repository}: not in the hub's cache{at}, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE to download it",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ModelNotFound(
        f"{repository}: cannot be downloaded: {reason}", hint="without a network, name a local folder or .gguf file"
    )
