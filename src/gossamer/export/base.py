"""The contract of an export: one checkpoint on its way to one target. Knows no file format and no engine.

An `Export` that exists can be written: whatever the target would read wrongly, or not at all, is refused when it is
made. What it writes is read back by a `Reader`, which is other code than wrote it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol, TypeAlias

import torch

from ..checkpoint import Checkpoint
from ..errors import ExportError, UnknownName
from ..formats import Dense, Format, Sparse
from ..model import FAMILIES

Progress: TypeAlias = Callable[[str, int, int], None]
"""progress(label, done, total)."""
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Name of a layout of floats -> dtype."""
FOLDER = "gossamer convert makes a folder that transformers loads"
"""The way out where no target is."""
RAGGED = "only llama and mistral models have an architecture for that, and only --to gguf"
"""The same where layers differ in shape."""
MISTAKE = "nothing was written; this is a mistake of the exporter: please report it"
"""What is left to say where what was written is not what was meant."""


@dataclass(frozen=True)
class Options:
    """What may be asked of an export."""

    layout: str | None = None
    """One of the target's layouts; None: its own choice, by what is stored."""
    rounding: bool = False
    """Weights may be rounded where the target cannot hold them as they are."""
    llama_cpp: Path | None = None
    """Folder of llama.cpp's tools; None: they are looked for on PATH."""


class Reader(Protocol):
    """An export as its target reads it."""

    name: str
    """What reads, with its version."""
    nbytes: int
    """Bytes of all tensors."""

    def weight(self, name: str) -> torch.Tensor:
        """A float32 tensor by its Hugging Face name, in the Hugging Face layout."""
        ...


class Export(abc.ABC):
    """One checkpoint on its way to one target. Raises ExportError where the target cannot take it."""

    target: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]
    """What `Options.layout` may be; the first is the choice without one."""
    engine: ClassVar[str | None] = None
    """Which engine can run it, as `engines.py` names it."""
    families: ClassVar[tuple[str, ...]] = ("llama", "mistral")
    """Families of models that are written."""
    unknown: ClassVar[str] = "is not written for other engines"
    """What is to be said of another family."""
    one_file: ClassVar[bool] = False
    """The output is a file, not a folder."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self.checkpoint, self.options = checkpoint, options
        if checkpoint.config.family not in self.families:
            raise ExportError(
                f"{self.target}: the family {checkpoint.config.family} ({checkpoint.name}) {self.unknown}",
                hint=f"written for {self.target} are {', '.join(self.families)}; {FOLDER}",
            )
        self.layout = (options.layout or self.layouts[0]).lower()
        if self.layout not in self.layouts:
            raise UnknownName(f"layout of {self.target}", self.layout, self.layouts)
        self.rounded: set[str] = set()
        """Names of tensors that the target holds rounded."""

    @abc.abstractmethod
    def write(self, path: Path, progress: Progress) -> None:
        """Write the file or fill the folder."""

    @abc.abstractmethod
    def reader(self, path: Path) -> Reader:
        """What was written, ready to be compared."""

    def same(self, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        """True if what was read back is this tensor, bit by bit."""
        return torch.equal(ours, theirs)

    def round_or_refuse(self, name: str, why: str, way_out: str) -> None:
        """Note that this tensor is rounded if that is allowed. Raises ExportError naming it and the way out."""
        if not self.options.rounding:
            form = self.checkpoint.format(name).name
            raise ExportError(
                f"{self.target}: {name} ({form}) {why}", hint=f"{way_out}, or let it be rounded: --allow-rounding"
            )
        self.rounded.add(name)

    def round_as_asked(self, name: str, why: str, way_out: str) -> None:
        """The same where a layout was asked for: floats are rounded to it without more ado, a second grid is not."""
        if self.options.layout is not None and isinstance(form_of(self.checkpoint, name), Dense):
            self.rounded.add(name)
        else:
            self.round_or_refuse(name, why, way_out)


def form_of(checkpoint: Checkpoint, name: str) -> Format:
    """How a weight is stored; of a sparse one, how its numbers are, for no other engine keeps zeros apart."""
    form = checkpoint.format(name)
    return form.inner if isinstance(form, Sparse) else form


def stored_of(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """What stores a weight as `form_of` says, the zeros of a sparse one filled in."""
    form, stored = checkpoint.format(name), checkpoint.stored(name)
    return form.filled(stored) if isinstance(form, Sparse) else stored


def is_uniform(checkpoint: Checkpoint) -> bool:
    """True if all layers have the same shape; what they see and how they are turned may differ."""
    return len({replace(layer, window=None, rope=None) for layer in checkpoint.config.layers}) == 1


def refuse_ragged(checkpoint: Checkpoint, target: str) -> None:
    """Raises ExportError if layers differ in shape, which almost no other engine can read."""
    if not is_uniform(checkpoint):
        deci = checkpoint.config.family in ("llama", "mistral")
        raise ExportError(
            f"{target}: the layers of {checkpoint.name} differ in heads, width or biases, which it cannot read",
            hint="--to gguf writes them for llama.cpp (architecture deci)" if deci else RAGGED,
        )


def holds(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> bool:
    """True if this dtype holds every value of a tensor as it is."""
    form = form_of(checkpoint, name)
    if isinstance(form, Dense) and dtype in (form.dtype, torch.float32):
        return True
    tensor = checkpoint.tensor(name)
    return torch.equal(tensor.to(dtype).float(), tensor)


def in_block(checkpoint: Checkpoint, name: str) -> bool:
    """True for a tensor of a block."""
    return name.startswith(FAMILIES[checkpoint.config.family].block.partition("{")[0])


def linear_formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """Name -> format of every matrix inside the blocks, in the model's order."""
    names = (name for name in checkpoint.names() if len(checkpoint.shape(name)) == 2 and in_block(checkpoint, name))
    return {name: form_of(checkpoint, name) for name in names}
