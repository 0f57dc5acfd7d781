"""Reading and writing models: Hugging Face folders, GGUF files, the hub; tokenizers; the manifest of an artifact.

Names are imported when they are first asked for: what needs no tensor, such as chat templates, loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .atomic import Lock, atomic_folder, write_file
    from .base import Checkpoint
    from .manifest import Manifest, read_manifest, verify_files, write_manifest
    from .open import open_checkpoint
    from .safetensors_io import Entry, SafetensorsFile, write_safetensors
    from .tokenizer import Tokenizer

_HOMES = {
    "Checkpoint": "base",
    "Entry": "safetensors_io",
    "Lock": "atomic",
    "Manifest": "manifest",
    "SafetensorsFile": "safetensors_io",
    "Tokenizer": "tokenizer",
    "atomic_folder": "atomic",
    "open_checkpoint": "open",
    "read_manifest": "manifest",
    "verify_files": "manifest",
    "write_file": "atomic",
    "write_manifest": "manifest",
    "write_safetensors": "safetensors_io",
}

__all__ = [
    "Checkpoint",
    "Entry",
    "Lock",
    "Manifest",
    "SafetensorsFile",
    "Tokenizer",
    "atomic_folder",
    "open_checkpoint",
    "read_manifest",
    "verify_files",
    "write_file",
    "write_manifest",
    "write_safetensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
