"""A checkpoint seen through a change of its weights: what every such view has, whatever it changes."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.tokenizer import Tokenizer
from ..formats import Dense, Format


class View(Checkpoint):
    """Another checkpoint's tensors, all of them in its float dtype, computed whenever they are read by `tensor`.

    Who inherits sets `config`, `hf_config` and `_shapes`.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.name, self.path, self.dtype = base.name, base.path, base.dtype
        self.manifest, self.source_note = base.manifest, base.source_note

    @abc.abstractmethod
    def tensor(self, name: str, rows: slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The changed tensor, or these rows of it."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Of the base, and of what is changed."""

    def format(self, name: str) -> Format:
        self.shape(name)
        return Dense(self.dtype)

    def stored(self, name: str) -> dict[str, Tensor]:
        return {"weight": self.tensor(name, dtype=self.dtype)}

    def _make_tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name, slice(start, stop), self.dtype)

    def _files(self) -> list[Path]:
        return self.base._files()

    def _contents(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        return ((name, iter((self.tensor(name, dtype=self.dtype),))) for name in self.names())
