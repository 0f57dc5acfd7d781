"""LLM.int8(): 8-bit rows, and the few input channels with outliers among their activations kept beside in float.

Dettmers et al., arXiv 2208.07339. The paper looks for outliers as the model runs; here the calibration inputs decide,
so that an artifact says once and for all which columns are kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...formats import Codes, Format, Integer, Outliers
from ...model import ModelConfig
from ..blockview import BlockView
from ..method import BlockQuantizer, GridOptions, QuantizeOptions
from ..walk import TOKENS_AT_ONCE
from .fold import carries
from .grid import grid_of, quantize
from .smoothquant import largest


class LLMInt8Options(QuantizeOptions):
    bits: int = Field(8, ge=2, le=8, description="bits per weight: 2, 3, 4, 5, 6 or 8")
    group_size: int | Literal["channel", "auto"] = Field("channel", description="columns that share a scale")
    threshold: float = Field(6.0, gt=0, description="a column is kept if an activation of its channel reaches this")
    outlier_share: float = Field(
        0.02, ge=0, le=1, description="share of a layer's columns that may be kept, the largest first"
    )

    @model_validator(mode="after")
    def _only_integers(self) -> LLMInt8Options:
        others = [grid.format for grid in (self, *self.layers.values()) if grid.format != "int"]
        if others:
            raise ValueError(f"llm-int8 keeps outliers beside integers, not beside {others[0]}")
        return self

    def layer_format(self, grid: GridOptions, columns: list[int]) -> Format:
        """Integers with room beside them for the columns that may be kept."""
        form = grid.format_for(columns)
        assert isinstance(form, Integer)
        return replace(form, outliers=True, outlier_share=self.outlier_share)


class LLMInt8(BlockQuantizer):
    """Rounds all columns but those that meet outliers; their grid is fitted without them."""

    name = "llm-int8"
    Options = LLMInt8Options
    options: LLMInt8Options

    def compress(self, view: BlockView) -> None:
        """Decide every linear layer of a block. Raises NumericalError, ShapeMismatch."""
        o = self.options
        for roles in view.points:
            activations = largest(view.inputs(roles[0]))
            carries(view, roles, activations)
            columns = outlier_columns(activations, o.threshold, o.outlier_share)
            for role in roles:
                weight = getattr(view.block, role).weight
                view.put(role, kept(weight, columns, view.form(role), o.clip))

    def peak_bytes(self, config: ModelConfig, index: int, sequences: int, length: int) -> int:
        """A few copies of the largest weight, and a step's activations."""
        layer = config.layers[index]
        largest = max(rows * columns for rows, columns in layer.linear_shapes(config.hidden_size).values())
        activations = 6 * max(TOKENS_AT_ONCE, length) * (layer.ffn_width + layer.q_size + config.hidden_size)
        return 4 * (5 * largest + activations)


def outlier_columns(activations: Tensor, threshold: float, share: float) -> Tensor:
    """Channels, in rising order, whose largest activation [in] reaches the threshold; at most a share of them all."""
    order = activations.argsort(descending=True, stable=True)[: round(share * len(activations))]
    return order[activations[order] >= threshold].sort().values


def kept(weight: Tensor, columns: Tensor, form: Format, clip: str) -> Codes:
    """Codes of a weight [out, in] whose `columns` [n] are kept beside as numbers of bfloat16."""
    rest = weight.index_fill(1, columns, 0.0)
    codes = quantize(rest, *grid_of(rest, form, clip), form)
    rows = torch.arange(len(weight), dtype=torch.int32)
    outliers = Outliers(
        rows=rows.repeat_interleave(len(columns)),
        columns=columns.to(torch.int32).repeat(len(weight)),
        values=weight[:, columns].bfloat16().float().flatten(),
    )
    return Codes(codes.codes, codes.scale, codes.zero, outliers=outliers)
