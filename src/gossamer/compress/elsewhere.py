"""Blocks that other processes make: what these are told, and what comes back.

A block that follows from what its part of the recipe was given, and from nothing that the part has made, can be made in
any order, by any process that sees the model and the work folder. Knows no cluster: who does the work is handed in.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checkpoint import open_checkpoint
from ..checkpoint.safetensors_io import SafetensorsFile, whole, write_safetensors
from ..errors import CompressionError
from .method import WeightMethod
from .oneblock import OneBlock
from .plan import Plan
from .recipe import Part
from .source import Source
from .units import block_unit

Spread: TypeAlias = Callable[[Iterable[tuple[str, Callable[[], Any]]]], Iterable[tuple[str, Any]]]
"""Has named pieces of work done, asking for few in advance, and gives the name and the result of each as it ends."""


@dataclass(frozen=True)
class BlockWork:
    """One block of a part, and all that a process must know to make it."""

    model: Path
    """What the part was given, before its transforms."""
    fingerprint: str
    """Of that model."""
    part: Part
    plan: Plan
    seed: int
    threads: int
    folder: Path
    """Where finished units are."""
    index: int = 0
    streams: Path | None = None
    """A file of `x` and `target`, if the block is learned from them."""

    def __call__(self) -> tuple[str, dict[str, Any]]:
        """Make the block: the name of a file in the folder, which nobody else writes, and the notes of the unit."""
        torch.set_num_threads(self.threads)
        given = open_checkpoint(self.model)
        if given.fingerprint() != self.fingerprint:
            raise CompressionError(f"{self.model} is not everywhere the same model", hint="share it between all nodes")
        source, method = Source(self.part.view(given)), self.part.main
        assert isinstance(method, WeightMethod)
        one = OneBlock(source, self.plan, method, self.seed)
        if self.streams is None:
            tensors, notes = one.alone(self.index)
        else:
            file = SafetensorsFile(self.streams)
            x, target = file.read("x"), file.read("target")
            tensors, notes = one.learned(self.index, x, target, source.rotation(x.shape[1]))
        made = f"{block_unit(self.index)}.{uuid.uuid4().hex}"
        write_safetensors(self.folder / made, [whole(name, tensor) for name, tensor in tensors.items()])
        return made, notes


class Elsewhere:
    """Has the blocks of one part made."""

    def __init__(self, spread: Spread, work: BlockWork) -> None:
        """`work`: for any block of the part."""
        self._spread, self._work = spread, work

    def make(
        self, blocks: Iterable[tuple[int, tuple[Tensor, Tensor] | None]]
    ) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Unit, file and notes of each block as it ends; `blocks`: numbers, with x and target where learned from them.

        Streams lie on disk from when a block is asked for until it is made.
        """
        waiting: dict[str, Path | None] = {}

        def works() -> Iterator[tuple[str, BlockWork]]:
            for i, streams in blocks:
                unit = block_unit(i)
                waiting[unit] = None if streams is None else self._written(unit, *streams)
                yield unit, replace(self._work, index=i, streams=waiting[unit])

        for unit, (made, notes) in self._spread(works()):
            file = waiting.pop(unit)
            if file is not None:
                file.unlink()
            yield unit, made, notes

    def _written(self, unit: str, x: Tensor, target: Tensor) -> Path:
        file = self._work.folder / f"{unit}-streams.safetensors"
        write_safetensors(file, [whole("x", x), whole("target", target)])
        return file
