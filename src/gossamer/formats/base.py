"""The contract of a weight format: how a float matrix becomes named tensors on disk, and back.

A format knows nothing of models, files or methods. A *method* chooses codes and scales; the format stores them.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TypeAlias

import torch

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""The stored form of one weight: local tensor name (`weight`, `weight_packed`, ...) to tensor."""


class Format(abc.ABC):
    """One way to store a weight matrix [out_features, in_features]."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short and exact, such as `bf16`, `int4-g64-sym`, `int8-channel-sym`."""

    @abc.abstractmethod
    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Local name, dtype and shape of every tensor that stores a weight of this shape. Raises ShapeMismatch."""

    @abc.abstractmethod
    def unpack(self, tensors: Tensors, rows: slice | None = None) -> torch.Tensor:
        """The float32 weight [out_features, in_features] (or these rows of it). Raises KernelError on bad tensors."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of this shape takes, scales and zero points counted."""
        total = 0
        for dtype, stored_shape in self.stored(shape).values():
            count = 1
            for n in stored_shape:
                count *= n
            total += count * dtype.itemsize
        return total

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits over the number of weights, scales and zero points counted."""
        count = 1
        for n in shape:
            count *= n
        return self.nbytes(shape) * 8 / count
