"""A random block with outlier channels in its inputs, as a BlockQuantizer is given it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gossamer.compress.blockview import BlockView
from gossamer.formats import Format
from gossamer.model.config import LayerConfig, ModelConfig, Rope
from gossamer.model.decoder import Block, RMSNorm, Rotation
from gossamer.model.families import LINEARS

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 4, 2, 16, 96


def make_config(bias: bool = False) -> ModelConfig:
    layer = LayerConfig(HEADS, KV_HEADS, HEAD_DIM, FFN, frozenset(LINEARS if bias else ()))
    return ModelConfig("llama", 300, HIDDEN, (layer,), 1e-5, Rope(), "silu", False, 128)


def make_block(seed: int = 0, bias: bool = False, dtype: torch.dtype = torch.float32) -> Block:
    """Random weights; two channels of each norm are far larger than the rest. Norms and biases are bfloat16 numbers."""
    generator = torch.Generator().manual_seed(seed)
    block = Block(make_config(bias), 0)
    for name, parameter in block.named_parameters():
        wide = parameter.dim() == 2
        value = torch.randn(parameter.shape, generator=generator) * (0.2 if wide else 0.3)
        if name.endswith("norm.weight"):
            value = value.abs() + 0.5
            value[[3, 17]] *= 12
        parameter.data = (value if wide else value.bfloat16()).to(dtype)
    return block.eval()


def make_inputs(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """[sequences, time, hidden] with channels of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(HIDDEN, generator=generator) * 2 + 0.1
    return (torch.randn(6, 40, HIDDEN, generator=generator) * sizes).to(dtype)


def make_rotation() -> Rotation:
    return Rotation(torch.arange(40).unsqueeze(0), Rope(), HEAD_DIM)


def make_view(block: Block, form: Format | Mapping[str, Format], x: Tensor | None = None) -> BlockView:
    """A view of the block in which every linear layer has this format (or its own)."""
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    forms = dict(form) if isinstance(form, Mapping) else dict.fromkeys(roles, form)
    x = make_inputs() if x is None else x
    rotation = make_rotation()
    with torch.no_grad():
        target = block(x, rotation)
    return BlockView(block, x, target, rotation, forms, {role: f"model.layers.0.{role}_proj" for role in roles})


def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in float64, so that a block of float64 computes in it throughout."""

    def forward(self: SimpleNamespace, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(RMSNorm, "forward", forward)


def output_error(block: Block, original: Block, x: Tensor) -> float:
    """Squared error of a block's output, in the output's square less the input's part of it."""
    rotation = make_rotation()
    with torch.no_grad():
        right, wrong = original(x, rotation), block(x, rotation)
        return float((wrong - right).square().sum() / (right - x).square().sum())
