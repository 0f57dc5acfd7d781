"""SignRound, known as AutoRound (Cheng et al., arXiv 2309.05516): learned rounding by signed gradient descent.

Each weight w of a group is rounded as clamp(round(w / s + z + v)) with an offset v in [-1/2, 1/2] that says whether it
goes up or down, and the group's range is shrunk by factors. All of them move by a fixed step against the sign of their
gradient, and the step falls to zero: no offset can miss the half that it may have to go.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from ...formats import Codes
from ..blockview import BlockView
from ..blockwise import (
    RoundedLearner,
    RoundedOptions,
    SignDescent,
    Start,
    learn,
    linear,
    starts_of,
)
from ..fakequant import code_range, codes_of, fake_quantize

FACTORS = (0.5, 1.1)
"""Bounds of what the ends of a group's range are multiplied by."""


class SignRoundOptions(RoundedOptions):
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="first step of an offset; null: 1 / steps, from the codes of GPTQ 0.3 / steps",
    )
    clip_rate: float = Field(
        default=3e-4, ge=0, description="first step of the factors of a group's range; 0: fixed ranges"
    )

    @property
    def rate(self) -> float:
        """The first step of an offset. A long way is no good from codes that hold each other's errors in balance."""
        return self.learning_rate or (0.3 if self.start == "gptq" else 1.0) / max(self.steps, 1)


class SignRound(RoundedLearner):
    """Learns a block's rounding offsets and clipping, from the codes of GPTQ or of rounding."""

    name = "signround"
    Options = SignRoundOptions
    options: SignRoundOptions

    def compress(self, view: BlockView) -> None:
        """Decide every linear layer of a block. Raises NumericalError, ShapeMismatch, CompressionError."""
        o = self.options
        layers = {role: OffsetWeight(start) for role, start in starts_of(view, o).items()}
        optimizer = SignDescent(
            [
                {"params": [layer.offset for layer in layers.values()], "rate": o.rate},
                {"params": [f for layer in layers.values() for f in layer.factors], "rate": o.clip_rate},
            ]
        )

        def weights() -> Mapping[str, Tensor]:
            return {f"{role}.weight": layer.weight() for role, layer in layers.items()}

        def limit() -> None:
            for layer in layers.values():
                layer.offset.clamp_(-0.5, 0.5)
                for factor in layer.factors:
                    factor.clamp_(*FACTORS)

        learn(view, weights, optimizer, o, linear, limit)
        for role, layer in layers.items():
            view.put(role, layer.codes())


class OffsetWeight:
    """One linear layer with a rounding offset for each weight, and a factor for each end of a group's range."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.offset = nn.Parameter(torch.zeros_like(start.weight))
        """[out, in], in steps."""
        ends = 1 if start.zero is None else 2
        self.factors = [nn.Parameter(torch.ones_like(start.scale)) for _ in range(ends)]
        """[out, groups]: of the whole range if symmetric, else of its upper and its lower end."""

    def weight(self) -> Tensor:
        """The rounded weight [out, in]."""
        scale, zero = self._grid()
        return fake_quantize(self._shifted(scale), scale, zero, self.start.form)

    def codes(self) -> Codes:
        """What `weight` stands for."""
        with torch.no_grad():
            scale, zero = self._grid()
            return codes_of(self._shifted(scale), scale, zero, self.start.form)

    def _shifted(self, scale: Tensor) -> Tensor:
        steps = self.offset.view(*scale.shape, -1) * scale.unsqueeze(-1)
        return self.start.weight + steps.flatten(1)

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        start, low, high = self.start, *code_range(self.start.form)
        if start.zero is None:
            return start.scale * self.factors[0], None
        above, below = (high - start.zero) * self.factors[0], (start.zero - low) * self.factors[1]
        scale = start.scale * (above + below) / (high - low)
        return scale, low + start.scale * below / scale
