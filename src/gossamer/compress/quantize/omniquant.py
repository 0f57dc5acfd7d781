"""OmniQuant (Shao et al., arXiv 2308.13137): learned weight clipping and learned equivalent scaling, block by block.

Weights are rounded to nearest throughout; what is learned is the part of each group's range that the grid covers, and a
scale for each input channel that is divided out of what makes the input (see `fold.py`), so that the block computes the
same but is easier to round.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from ...formats import Integer
from ..blockview import BlockView
from ..blockwise import BlockLearner, LearnOptions, block_error, integer_form, learn
from ..fakequant import codes_of, fake_quantize
from .fold import fold, folds_up, norm_offset
from .grid import grid_of

WIDEST = 0.982
"""The largest part of a range that training begins with: a sigmoid of 4, as in the paper."""


class OmniQuantOptions(LearnOptions):
    clip_rate: float = Field(
        default=0.01, ge=0, description="learning rate of the logits of the parts of ranges; 0: fixed"
    )
    scale_rate: float = Field(
        default=0.005, ge=0, description="learning rate of the logarithms of input scales; 0: no scaling"
    )


class OmniQuant(BlockLearner):
    """Learns clipping and scaling with Adam, folds the scales, then rounds to nearest."""

    name = "omniquant"
    Options = OmniQuantOptions
    options: OmniQuantOptions

    def compress(self, view: BlockView) -> None:
        """Decide every linear layer of a block. Raises NumericalError, ShapeMismatch, CompressionError."""
        o = self.options
        block = view.block
        clips = {}
        for role in view.roles:
            form = integer_form(view.form(role), view.name(role))
            clips[role] = Clipping(getattr(block, role).weight.detach(), form, o.clip)
        scales = Scales(view)
        groups = [
            {"params": [p for clip in clips.values() for p in clip.parts], "rate": o.clip_rate},
            {"params": scales.logs, "rate": o.scale_rate},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["rate"]] or groups, lr=0.0, betas=(0.9, 0.95))

        def rounded() -> Mapping[str, Tensor]:
            params = scales.scaled()
            return params | {f"{r}.weight": clip.rounded(params[f"{r}.weight"]) for r, clip in clips.items()}

        start = [p.detach().clone() for clip in clips.values() for p in clip.parts]
        plain = {name: p.detach().clone() for name, p in block.named_parameters()}
        learned = learn(view, rounded, optimizer, o)
        scales.fold()

        def folded() -> Mapping[str, Tensor]:
            return {f"{r}.weight": clip.rounded(getattr(block, r).weight) for r, clip in clips.items()}

        with torch.no_grad():
            # Folding rounds norms to what can be stored: rarely, that costs all that was won.
            if learned.after < learned.before and not block_error(view, folded) <= learned.before:
                for name, p in block.named_parameters():
                    p.copy_(plain[name])
                for p, first in zip((p for clip in clips.values() for p in clip.parts), start, strict=True):
                    p.copy_(first)
            for role, clip in clips.items():
                weight = getattr(block, role).weight.detach()
                view.put(role, codes_of(weight, *clip.grid(weight), clip.form))


class Clipping:
    """The parts of the ranges of a layer's groups that their grids cover, as logits [out, groups] of a sigmoid."""

    def __init__(self, weight: Tensor, form: Integer, clip: str) -> None:
        self.form = form
        full, _ = grid_of(weight, form)
        part = (grid_of(weight, form, clip)[0] / full).clamp(0.05, WIDEST)
        ends = 1 if form.symmetric else 2
        self.parts = [nn.Parameter(torch.logit(part)) for _ in range(ends)]
        """Of the largest size if symmetric, else of the highest and of the lowest weight."""

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [out, groups] for a weight [out, in], before they are rounded to what is stored."""
        grouped = weight.view(weight.shape[0], self.form.groups(weight.shape[1]), -1)
        high, low = grouped.amax(-1), grouped.amin(-1)
        parts, steps = [p.sigmoid() for p in self.parts], 2**self.form.bits - 1
        if self.form.symmetric:
            return _positive(torch.maximum(high, -low) * parts[0] * 2 / steps), None
        high, low = high.clamp(min=0) * parts[0], low.clamp(max=0) * parts[1]
        scale = _positive((high - low) / steps)
        return scale, -(2 ** (self.form.bits - 1)) - low / scale

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight [out, in] rounded to nearest on its clipped grid."""
        return fake_quantize(weight, *self.grid(weight), self.form)


class Scales:
    """Logarithms of the scales of the inputs at each point of a block, for the block's parameters as they stand."""

    def __init__(self, view: BlockView) -> None:
        self.block, self.points = view.block, view.points
        layer, hidden = self.block.layer, view.x.shape[-1]
        self.logs = [nn.Parameter(torch.zeros(n)) for n in (hidden, layer.kv_size, hidden, layer.ffn_width)]
        """At (q, k, v), (o), (gate, up) and (down); that of o for each key-value head, whose values its heads share."""
        self.logs[3].requires_grad_(folds_up(self.block))

    def scaled(self) -> dict[str, Tensor]:
        """Every parameter of the block, scaled: the block computes the same."""
        params: dict[str, Tensor] = {name: p.detach() for name, p in self.block.named_parameters()}
        values, ups = self.logs[1].exp(), self.logs[3].exp()
        for norm, scale in (("attn_norm", self.logs[0].exp()), ("ffn_norm", self.logs[2].exp())):
            offset = norm_offset(getattr(self.block, norm))
            params[f"{norm}.weight"] = (params[f"{norm}.weight"] + offset) / scale - offset
            if f"{norm}.bias" in params:
                params[f"{norm}.bias"] = params[f"{norm}.bias"] / scale
        for roles, scale in zip(self.points, self.inputs(), strict=True):
            for role in roles:
                params[f"{role}.weight"] = params[f"{role}.weight"] * scale
        for role, scale in (("v", values), ("up", ups)):
            params[f"{role}.weight"] = params[f"{role}.weight"] / scale.unsqueeze(1)
            if f"{role}.bias" in params:
                params[f"{role}.bias"] = params[f"{role}.bias"] / scale
        return params

    def inputs(self) -> list[Tensor]:
        """The scale [in] of the input at each point."""
        layer = self.block.layer
        values = self.logs[1].exp().view(layer.num_kv_heads, 1, layer.head_dim).expand(-1, layer.group, -1)
        return [self.logs[0].exp(), values.flatten(), self.logs[2].exp(), self.logs[3].exp()]

    @torch.no_grad()
    def fold(self) -> None:
        """Put the scales into the block's own parameters."""
        for roles, scale in zip(self.points, self.inputs(), strict=True):
            if bool((scale != 1).any()):
                fold(self.block, roles, scale)


def _positive(scale: Tensor) -> Tensor:
    """Scales, with 1 for groups of zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
