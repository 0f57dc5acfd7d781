"""Folders in compressed-tensors form, which transformers and vLLM load: what our artifacts are already, checked.

Copied as it is stored; weights that compressed-tensors has no words for, and packed embeddings, become floats if they
can without loss, or if that is allowed. vLLM fuses q, k, v and gate, up, so those must be in one format each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, Entry
from ..checkpoint.files import read_json
from ..checkpoint.gguf import GGMLBlocks
from ..checkpoint.save import entries
from ..errors import ExportError
from ..formats import Dense, Kind, only_ours, quantization_config
from ..model import FAMILIES
from .base import FLOATS, Options, form_of, linear_formats, stored_of
from .folders import FolderExport, FolderReader, lazy

FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


class TransformersExport(FolderExport):
    """A folder that transformers loads."""

    target = "transformers"
    some_windows = True
    layouts = ("stored", *FLOATS)
    engine = "transformers"

    def is_packed(self, name: str) -> bool:
        form = form_of(self.checkpoint, name)
        if self.layout in FLOATS or len(self.checkpoint.shape(name)) != 2 or isinstance(form, Dense | GGMLBlocks):
            return False
        kind: Kind = "embedding" if name == f"{self._family.embed}.weight" else "linear"
        return not only_ours({name: form}, {name: kind}) and not self._is_tied_head(name)

    def packed(self, name: str) -> list[Entry]:
        if form_of(self.checkpoint, name) is self.checkpoint.format(name):
            return entries(self.checkpoint, name)
        stored = form_of(self.checkpoint, name).stored(self.checkpoint.shape(name))
        module = name.removesuffix(".weight")
        return [lazy(f"{module}.{local}", *of, partial(self._local, name, local)) for local, of in stored.items()]

    def _local(self, name: str, local: str) -> torch.Tensor:
        return stored_of(self.checkpoint, name)[local]

    def quantization_config(self) -> dict[str, Any] | None:
        matrices = [name for name in self.checkpoint.names() if len(self.checkpoint.shape(name)) == 2]
        formats = {
            name.removesuffix(".weight"): form_of(self.checkpoint, name) if self.is_packed(name) else Dense(self.dtype)
            for name in matrices
        }
        kinds: dict[str, Kind] = {m: "embedding" if m == self._family.embed else "linear" for m in formats}
        return quantization_config(formats, kinds, self._family.head)

    def reader(self, path: Path) -> CompressedReader:
        return CompressedReader(path)

    @property
    def _family(self) -> Any:
        return FAMILIES[self.checkpoint.config.family]

    def _is_tied_head(self, name: str) -> bool:
        return self.checkpoint.config.tie_embeddings and name == f"{self._family.head}.weight"


class VLLMExport(TransformersExport):
    """A folder that vLLM loads."""

    target = "vllm"
    some_windows = False
    engine = "vllm"

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        super().__init__(checkpoint, options)
        formats = linear_formats(checkpoint)
        for group in FUSED:
            for name, form in formats.items():
                if name.endswith(f".{group[0]}.weight"):
                    self._require_one(name, form.name, group)

    def _require_one(self, name: str, wanted: str, group: tuple[str, ...]) -> None:
        """Raises ExportError unless all weights that vLLM multiplies at once are in one format."""
        for other in group[1:]:
            sibling = name.replace(group[0], other)
            found = form_of(self.checkpoint, sibling).name
            if found != wanted:
                raise ExportError(
                    f"vllm: {sibling} is {found}, and {name} is {wanted}: vLLM multiplies by both at once",
                    hint="give them one format under `layers:` of the recipe; --to transformers takes them as they are",
                )


class CompressedReader(FolderReader):
    """The folder as the package `compressed-tensors` decompresses it, by what its config.json says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from compressed_tensors.quantization import QuantizationScheme

        self.name = f"package compressed-tensors {version('compressed-tensors')}"
        config: Mapping[str, Any] = read_json(folder / "config.json").get("quantization_config") or {}
        self._ignored = set(config.get("ignore", []))
        self._groups = [
            (set(group["targets"]), group["format"], QuantizationScheme.model_validate(group))
            for group in config.get("config_groups", {}).values()
        ]

    def unpacked(self, module: str) -> torch.Tensor:
        from compressed_tensors.compressors import BaseCompressor

        form, scheme = next(
            (form, scheme)
            for targets, form, scheme in self._groups
            if module in targets or ("Linear" in targets and module not in self._ignored)
        )
        compressor = BaseCompressor.get_value_from_registry(form)
        prefix = f"{module}."
        stored = {n.removeprefix(prefix): self.tensor(n) for n in self._where if n.startswith(prefix)}
        if stored["weight_scale"].dtype in (torch.bfloat16, torch.float16):  # it multiplies in the dtype of the scales
            stored["weight_scale"] = stored["weight_scale"].float()
        found: torch.Tensor = compressor.decompress(stored, scheme)["weight"].float()
        return found

    def weight(self, name: str) -> torch.Tensor:
        module, _, suffix = name.rpartition(".")
        quantized = suffix == "weight" and self.has(f"{module}.weight_scale")
        return self.unpacked(module) if quantized else self.tensor(name).float()
