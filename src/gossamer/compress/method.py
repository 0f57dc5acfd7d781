"""The contract of a compression method. A method sees one weight and its statistics; the pipeline owns all the rest.

To add one: a file with a class like `quantize/rtn.py`, and a row in `registry.py`.
"""

from __future__ import annotations

import abc
import enum
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..formats import Codes, Integer, nearest_group_size


class Needs(enum.Enum):
    """What a method must be given besides the weight."""

    NOTHING = "nothing"
    HESSIAN = "hessian"
    """H = X^T X [in, in] over the calibration inputs X [tokens, in] of the layer."""


class Options(BaseModel):
    """Options of a method, as a recipe writes them: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GridOptions(Options):
    """An integer grid: how many bits, shared by how many columns."""

    bits: int = Field(4, ge=2, le=8, description="bits per weight: 2, 3, 4 or 8")
    group_size: int | Literal["channel", "auto"] = Field(
        64, description="columns that share a scale; `channel`: the whole row; `auto`: nearest to 64 that divides all"
    )
    symmetric: bool = Field(True, description="no zero point")

    def integer(self, columns: list[int]) -> Integer:
        """The format for layers with these row lengths; `auto` is resolved here."""
        size: int | None
        if self.group_size == "channel":
            size = None
        elif self.group_size == "auto":
            size = nearest_group_size(64, columns)
        else:
            size = int(self.group_size)
        return Integer(self.bits, size, self.symmetric)


class QuantizeOptions(GridOptions):
    """Options that every weight quantizer takes. The embedding and the head stay in float unless named."""

    clip: Literal["none", "mse"] = Field(
        "none", description="mse: shrink each group's range to the least squared error"
    )
    embedding: GridOptions | None = Field(None, description="grid of the embedding (rounded to nearest); null: float")
    head: GridOptions | None = Field(None, description="grid of the head; a tied head is the embedding")


class Quantizer(abc.ABC):
    """A method that turns one linear layer's weight into integer codes."""

    family: ClassVar[str] = "quantize"
    name: ClassVar[str]
    needs: ClassVar[Needs]
    Options: ClassVar[type[QuantizeOptions]]

    def __init__(self, options: QuantizeOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def quantize(self, weight: Tensor, form: Integer, hessian: Tensor | None) -> Codes:
        """Codes of a float32 weight [out, in] on the grid of `form`; `hessian` [in, in] if the method needs it."""
