"""The finished pieces of one part of a run, durable in its work folder: each a file and a line of the journal.

A unit is computed from the source, the calibration tokens and the units before it, never from anything that only lives
in memory. Where several units hold a tensor, the last one counts: a later stage has changed it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.journal import Journal
from ..checkpoint.safetensors_io import SafetensorsFile, whole, write_safetensors
from ..formats import Format
from ..model.decoder import Block
from .plan import Plan
from .source import Source

DECISION = "decision"
"""The unit that holds what a reducer decided."""


class Units:
    """What is done of a run over `source` by `plan`, and how to read it back."""

    def __init__(self, folder: Path, journal: Journal, source: Source, plan: Plan, tuners: int) -> None:
        self.folder, self.journal, self.source, self.plan = folder, journal, source, plan
        self.tuned = [f"tuned-{n}" for n in range(tuners)]

    def names(self) -> list[str]:
        """Units that make up the output, in the order in which they are made."""
        family = self.source.family
        ends = [m for m in (family.embed, family.head) if m in self.plan.stored]
        return ends + [block_unit(i) for i in range(self.source.config.num_layers)] + self.tuned

    def is_done(self, unit: str) -> bool:
        return unit in self.journal.done

    def notes(self, unit: str) -> dict[str, Any]:
        """What was recorded with a finished unit."""
        notes: dict[str, Any] = self.journal.done[unit]["notes"]
        return notes

    def write(self, unit: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], file: str = "") -> None:
        """Finish a unit: it is done once this returns. One that is written again needs another `file` name."""
        path = self.folder / f"{file or unit}.safetensors"
        write_safetensors(path, [whole(name, t) for name, t in tensors.items()])
        self.journal.add(unit, path, notes)

    def take(self, unit: str, made: str, notes: Mapping[str, Any]) -> None:
        """Finish a unit whose file another process has written and synced, under the name `made` in the folder."""
        path = self.folder / f"{unit}.safetensors"
        os.replace(self.folder / made, path)
        self.journal.add(unit, path, notes)

    def open(self, unit: str) -> SafetensorsFile:
        """The tensors of a finished unit."""
        return SafetensorsFile(self.folder / self.journal.done[unit]["file"])

    def form(self, module: str) -> Format:
        return self.plan.formats[module]

    def stored(self, files: Mapping[str, SafetensorsFile], module: str) -> dict[str, Tensor]:
        """Stored tensors of a packed module by their local names."""
        return {local: files[f"{module}.{local}"].read(f"{module}.{local}") for local in self.locals(files, module)}

    def locals(self, files: Mapping[str, SafetensorsFile], module: str) -> list[str]:
        """Local names of a packed module's stored tensors."""
        prefix = f"{module}."
        return sorted(
            name.removeprefix(prefix) for name in files if name.startswith(prefix) and name != f"{prefix}bias"
        )

    def where(self, *units: str) -> dict[str, SafetensorsFile]:
        """Tensor name -> the file of the last of these units that holds it; here of all that are done."""
        found: dict[str, SafetensorsFile] = {}
        for unit in units or self.names():
            if self.is_done(unit):
                file = self.open(unit)
                found |= dict.fromkeys(file.names(), file)
        return found

    def finished_block(self, i: int) -> Block:
        """Block i in float32 as the output will have it before any tuning."""
        files = self.where(block_unit(i))

        def weight(module: str, role: str) -> Tensor:
            stored = self.stored(files, module)
            return self.form(module).unpack(stored) if stored else self.source.weight(module)

        def dense(name: str) -> Tensor:
            return files[name].read(name).float() if name in files else self.source.dense(name)

        return self.source.block(i, weight, dense)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block reads [sequences, time, hidden], as the output will embed tokens before any tuning."""
        module = self.source.family.embed
        form = self.form(module)
        rows: Callable[[slice], Tensor] | None = None
        if module in self.plan.stored:
            packed = self.stored(self.where(module), module)
            rows = lambda part: form.unpack(packed, part)  # noqa: E731
        return self.source.embed(tokens, rows)


def block_unit(i: int) -> str:
    """Name of the unit that holds block i."""
    return f"block-{i:04d}"
