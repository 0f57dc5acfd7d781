"""A weight stored as it is, in one float dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import KernelError
from .base import Format, Stored, Tensors

FLOAT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Dense(Format):
    """`weight` [out_features, in_features] in this dtype."""

    dtype: torch.dtype = torch.bfloat16

    group_size = None

    @property
    def name(self) -> str:
        return FLOAT_NAMES[self.dtype]

    @property
    def in_float(self) -> Dense:
        return Dense(torch.float32)

    def stored(self, shape: tuple[int, ...]) -> Stored:
        return {"weight": (self.dtype, shape)}

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> torch.Tensor:
        weight = tensors["weight"]
        if weight.dtype not in FLOAT_NAMES:
            raise KernelError(f"a dense weight cannot be {weight.dtype}", hint="expected float32, float16 or bfloat16")
        return (weight if rows is None else weight[rows]).float()
