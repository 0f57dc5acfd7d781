"""Reading and writing models: Hugging Face folders, GGUF files, the hub; tokenizers; the manifest of an artifact."""

from .atomic import Lock, atomic_folder, write_file
from .base import Checkpoint
from .manifest import Manifest, read_manifest, verify_files, write_manifest
from .open import open_checkpoint
from .safetensors_io import Entry, SafetensorsFile, write_safetensors
from .tokenizer import Tokenizer

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
