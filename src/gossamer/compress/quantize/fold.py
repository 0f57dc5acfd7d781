"""Scales folded into the layers before: input channels become easier to quantize, and the block computes the same.

Where linear layers read an input x [.., in], each channel may be divided by a scale and the column of their weights
multiplied by it: x W^T = (x / s) (W s)^T. The division costs nothing where whatever makes x can carry it:

    q k v      the norm before attention
    o          the rows of v; query heads that share a key-value head read the same values, so they share scales
    gate up    the norm before the feed-forward network
    down       the rows of up, which the gate's activation multiplies and nothing else changes; without a gate only if
               the activation is a ReLU, which any positive factor passes

Shared by AWQ, SmoothQuant and OmniQuant. Knows blocks; knows no grid and no method.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from ...model.decoder import Block, RMSNorm
from ..blockview import BlockView

Roles = tuple[str, ...]
"""Linear layers that read the same input: one of `blockview.POINTS`."""


def foldable(block: Block, roles: Roles, scale: Tensor) -> Tensor:
    """The scale [in] nearest to this one that can be folded at `roles` without changing the block.

    Heads that share values get the geometric mean of their scales. Norm weights and biases, which stay in float, must
    still be numbers that the artifact can store: the scale is moved by less than 0.4% so that the quotient is one of
    bfloat16 (the bias of a norm, which has the scale of its weight, is rounded to one). Where nothing can carry a
    scale, it is 1. Raises NumericalError if a scale is not positive and finite.
    """
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise NumericalError(
            f"a scale of the input of {', '.join(roles)} of block {block.index} is not positive and finite",
            hint="the calibration inputs or the weights of this block are zero, NaN or infinite: check the checkpoint",
        )
    if roles == ("o",):
        layer = block.layer
        heads = scale.view(layer.num_kv_heads, layer.group, layer.head_dim)
        shared = _storable(_linear(block, "v").bias, heads.log().mean(1).exp().flatten())
        return _repeat(block, shared)
    if roles == ("down",):
        return _storable(_linear(block, "up").bias, scale) if folds_up(block) else torch.ones_like(scale)
    norm = _norm(block, roles)
    return _storable(norm.weight, scale, norm_offset(norm))


def fold(block: Block, roles: Roles, scale: Tensor) -> Tensor:
    """Divide the input of `roles` by a scale [in] and multiply their columns by it, in place; returns what was folded.

    That is `foldable(block, roles, scale)`, whose errors it raises too.
    """
    scale = foldable(block, roles, scale)
    if roles == ("o",):
        rows = scale.view(block.layer.num_kv_heads, block.layer.group, -1)[:, 0].flatten()
        _divide_rows(_linear(block, "v"), rows)
    elif roles == ("down",):
        _divide_rows(_linear(block, "up"), scale)
    else:
        norm = _norm(block, roles)
        norm.weight.copy_(_divided(norm.weight, scale, norm_offset(norm)))
        if isinstance(norm, nn.LayerNorm):
            norm.bias.copy_(_divided(norm.bias, scale))
    for role in roles:
        _linear(block, role).weight.mul_(scale)
    return scale


def carries(view: BlockView, roles: Roles, sizes: Tensor) -> bool:
    """False if all these sizes of input channels [in] are zero: then no scale matters. Raises NumericalError on NaN."""
    if not torch.isfinite(sizes).all():
        names = ", ".join(view.name(role) for role in roles)
        raise NumericalError(
            f"{names}: {int((~torch.isfinite(sizes)).sum())} of {len(sizes)} input channels are NaN or infinite on the "
            "calibration text",
            hint="a block before it overflows, or the checkpoint is damaged: compare it with its source",
        )
    return bool((sizes > 0).any())


def _linear(block: Block, role: str) -> nn.Linear:
    return cast(nn.Linear, getattr(block, role))


def folds_up(block: Block) -> bool:
    """True if the rows of `up` can carry a scale of the input of `down`."""
    return block.layer.gated or block.activation == "relu"


def norm_offset(norm: nn.Module) -> float:
    """What is added to a norm's weight before it multiplies."""
    return norm.offset if isinstance(norm, RMSNorm) else 0.0


def _norm(block: Block, roles: Roles) -> nn.LayerNorm | RMSNorm:
    return cast("nn.LayerNorm | RMSNorm", block.attn_norm if "q" in roles else block.ffn_norm)


def _repeat(block: Block, shared: Tensor) -> Tensor:
    """A scale of values [kv_size] for every query head that reads them [q_size]."""
    layer = block.layer
    return shared.view(layer.num_kv_heads, 1, layer.head_dim).expand(-1, layer.group, -1).flatten()


def _divide_rows(linear: nn.Linear, scale: Tensor) -> None:
    linear.weight.div_(scale.unsqueeze(1))
    if linear.bias is not None:
        linear.bias.copy_(_divided(linear.bias, scale))


def _divided(values: Tensor, scale: Tensor, offset: float = 0.0) -> Tensor:
    return ((values + offset) / scale - offset).bfloat16().to(values.dtype)


def _storable(values: Tensor | None, scale: Tensor, offset: float = 0.0) -> Tensor:
    """The scale by which these values must be divided to become numbers of bfloat16; zeros leave it as it is.

    To what is divided and stored, `offset` is added.
    """
    if values is None:
        return scale
    divided = _divided(values, scale, offset) + offset
    return torch.where(divided / (values + offset) > 0, (values + offset) / divided, scale)
