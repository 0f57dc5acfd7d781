"""What folders of other engines have in common: a Hugging Face config, a tokenizer, safetensors. Knows no layout."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from ..checkpoint import Checkpoint, Entry
from ..checkpoint.save import told, write_companions, write_config, write_weights
from ..errors import ExportError, ProofFailed
from ..formats import Integer
from ..model import FAMILIES
from .base import FLOATS, MISTAKE, Export, Options, Progress, holds, linear_formats, refuse_ragged

FLOAT_RECIPES = "recipes that leave embedding and head in float (int4-gptq, int4-rtn, int8-rtn) give what it can read"


class FolderExport(Export):
    """A model folder of safetensors with one quantization_config."""

    families: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    some_windows: ClassVar[bool] = False
    """Only some layers may have a sliding window."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        super().__init__(checkpoint, options)
        refuse_ragged(checkpoint, self.target)
        if not self.some_windows and len({layer.window for layer in checkpoint.config.layers}) > 1:
            raise ExportError(
                f"{self.target}: only some layers of {checkpoint.name} have a sliding window, which it cannot read",
                hint="--to transformers takes them",
            )
        checkpoint.tokenizer()  # which raises TokenizerError if there is none
        self.dtype = FLOATS.get(self.layout, checkpoint.dtype)
        for name in checkpoint.names():
            if not self.is_packed(name):
                self._require_float(name)

    @abc.abstractmethod
    def is_packed(self, name: str) -> bool:
        """True for a weight that the target takes quantized; the others become floats."""

    @abc.abstractmethod
    def packed(self, name: str) -> list[Entry]:
        """The tensors that store a quantized weight."""

    @abc.abstractmethod
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says of the quantized weights; None if there are none."""

    def write(self, path: Path, progress: Progress) -> None:
        write_config(path, self.hf_config())
        write_companions(path, self.checkpoint)
        write_weights(path, told(self.entries(), progress))

    def entries(self) -> list[Entry]:
        """Every tensor of the folder."""
        names = self.checkpoint.names()
        return [e for n in names for e in (self.packed(n) if self.is_packed(n) else [self.float_entry(n)])]

    def float_entry(self, name: str) -> Entry:
        """A tensor that is no quantized weight, in the folder's float dtype."""
        shape = self.checkpoint.shape(name)
        return lazy(name, self.dtype, shape, lambda: self.checkpoint.tensor(name).to(self.dtype))

    def hf_config(self) -> dict[str, Any]:
        """config.json as the target reads it: without our own words, with the dtype and the layout of this folder."""
        config, family = dict(self.checkpoint.hf_config), FAMILIES[self.checkpoint.config.family]
        config.pop("gossamer_layers", None)
        config |= {"model_type": family.name, "architectures": [family.architecture]}
        config |= dict.fromkeys(("dtype", "torch_dtype"), str(self.dtype).removeprefix("torch."))
        config.pop("quantization_config", None)
        quantization = self.quantization_config()
        return config if quantization is None else {**config, "quantization_config": quantization}

    def _require_float(self, name: str) -> None:
        if holds(self.checkpoint, name, self.dtype):
            return
        why = f"is not exact in {str(self.dtype).removeprefix('torch.')}, as which {self.target} would take it"
        keeps = "--layout f32 keeps it, or " if "f32" in self.layouts else ""
        self.round_or_refuse(name, why, f"{keeps}{FLOAT_RECIPES}")


def lazy(name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> Entry:
    """An entry whose tensor is made when it is written."""

    def chunks() -> Iterator[torch.Tensor]:
        yield make().contiguous()

    return Entry(name, dtype, shape, chunks)


def one_grid(checkpoint: Checkpoint, target: str, wanted: str) -> Integer:
    """The integers in which every matrix inside the blocks is. Raises ExportError naming the first that is not."""
    formats = linear_formats(checkpoint)
    first = next(iter(formats.values()))
    for name, form in formats.items():
        if not isinstance(form, Integer) or form.outliers or form != first:
            other = "" if form == first else f", {next(iter(formats))} is {first.name}"
            raise ExportError(
                f"{target}: {name} is {form.name}{other}: it takes {wanted} in one grid for all layers",
                hint="recipes that give that: int4-gptq, int4-rtn, int4-awq; --to gguf and vllm take mixed ones",
            )
    assert isinstance(first, Integer)
    return first


class FolderReader(abc.ABC):
    """Tensors of a folder by the library `safetensors`; what they stand for is the subclass's own formula."""

    def __init__(self, folder: Path) -> None:
        self.name = f"package safetensors {version('safetensors')} and a formula of its own"
        self.folder = folder
        self._where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._where |= dict.fromkeys(list(file.keys()), file)  # type: ignore[no-untyped-call]
        self.nbytes = sum(self.tensor(name).nbytes for name in self._where)

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor. Raises ProofFailed if it is not there."""
        if name not in self._where:
            raise ProofFailed(f"{self.folder}: nothing stores {name}", hint=MISTAKE)
        found: torch.Tensor = self._where[name].get_tensor(name)
        return found

    def has(self, name: str) -> bool:
        return name in self._where

    def weight(self, name: str) -> torch.Tensor:
        return self.tensor(name).float() if self.has(name) else self.unpacked(name.removesuffix(".weight"))

    @abc.abstractmethod
    def unpacked(self, module: str) -> torch.Tensor:
        """float32 [out, in] of a quantized weight."""
