"""Pickle checkpoints (`.bin`, `.pt`): refused unless asked for, and then read with code execution ruled out."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from ..errors import CorruptCheckpoint, UnsafeCheckpoint
from .safetensors_io import TensorInfo, row_range

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse(path: Path) -> UnsafeCheckpoint:
    """The error for a pickle that nobody asked to be read."""
    return UnsafeCheckpoint(
        f"{path}: a pickle file can run code when it is read",
        hint="take the safetensors version of the model, or pass --allow-pickle to convert this one",
    )


class PickleFile:
    """Tensors of a torch.save file, mapped rather than read; `weights_only` refuses everything but tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = self._load(mmap=True)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpoint(f"{path}: holds more than tensors: {str(error)[:200]}") from error
        except Exception as error:  # torch raises many kinds for a damaged archive
            raise CorruptCheckpoint(f"{path}: not a torch checkpoint: {str(error)[:200]}") from error
        if not isinstance(content, dict):
            raise CorruptCheckpoint(f"{path}: holds a {type(content).__name__}, not named tensors")
        self._tensors: dict[str, torch.Tensor] = {}
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise CorruptCheckpoint(f"{path}: entry {name!r} is not a named dense tensor")
            claimed, held = value.numel() * value.itemsize, value.untyped_storage().nbytes()
            if value.device.type != "cpu" or claimed > held:  # strides of 0, or no storage at all
                raise CorruptCheckpoint(
                    f"{path}: tensor {name!r} {list(value.shape)} takes {claimed} bytes, but only {held} are stored"
                )
            self._tensors[name] = value

    def _load(self, *, mmap: bool) -> object:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError as error:
            if mmap and "mmap" in str(error):  # the old, unzipped container cannot be mapped
                return self._load(mmap=False)
            raise

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Raises CorruptCheckpoint if there is no such tensor. The offset means nothing here."""
        if name not in self._tensors:
            raise CorruptCheckpoint(f"{self.path}: no tensor {name!r}")
        tensor = self._tensors[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape), 0)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor, mapped; or a copy of these rows of it."""
        tensor = self._tensors[name]
        if rows is None or not tensor.dim():
            return tensor
        start, stop = row_range(rows, tensor.shape[0])
        return tensor[start:stop].clone(memory_format=torch.contiguous_format)
