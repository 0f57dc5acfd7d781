"""Scales folded into the layers before: input channels become easier to quantize, and the block computes the same.

Where linear layers read an input x [.., in], each channel may be divided by a scale and the column of their weights
multiplied by it: x W^T = (x / s) (W s)^T. The division costs nothing where whatever makes x can carry it:

    q k v      the norm before attention
    o          the rows of v; query heads that share a key-value head read the same values, so they share scales
    gate up    the norm before the feed-forward network
    down       the rows of up, which the gate's activation multiplies and nothing else changes

Shared by AWQ, SmoothQuant and OmniQuant. Knows blocks; knows no grid and no method.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from ...model.decoder import Block
from ..blockview import BlockView

Roles = tuple[str, ...]
"""Linear layers that read the same input: one of `blockview.POINTS`."""


def foldable(block: Block, roles: Roles, scale: Tensor) -> Tensor:
    """The scale [in] nearest to this one that can be folded at `roles` without changing the block.

    Heads that share values get the geometric mean of their scales. Norm weights and biases, which stay in float, must
    still be numbers that the artifact can store: the scale is moved by less than 0.4% so that the quotient is one of
    bfloat16. Raises NumericalError if a scale is not positive and finite.
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
        return _storable(_linear(block, "up").bias, scale)
    return _storable(_norm(block, roles), scale)


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
        weight = _norm(block, roles)
        weight.copy_(_divided(weight, scale))
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


def _norm(block: Block, roles: Roles) -> Tensor:
    return (block.attn_norm if "q" in roles else block.ffn_norm).weight


def _repeat(block: Block, shared: Tensor) -> Tensor:
    """A scale of values [kv_size] for every query head that reads them [q_size]."""
    layer = block.layer
    return shared.view(layer.num_kv_heads, 1, layer.head_dim).expand(-1, layer.group, -1).flatten()


def _divide_rows(linear: nn.Linear, scale: Tensor) -> None:
    linear.weight.div_(scale.unsqueeze(1))
    if linear.bias is not None:
        linear.bias.copy_(_divided(linear.bias, scale))


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).bfloat16().to(values.dtype)


def _storable(values: Tensor | None, scale: Tensor) -> Tensor:
    """The scale by which these values must be divided to become numbers of bfloat16; zeros leave it as it is."""
    if values is None:
        return scale
    divided = _divided(values, scale)
    return torch.where(divided == 0, scale, values / divided)
