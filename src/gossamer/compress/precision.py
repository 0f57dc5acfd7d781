"""In what floats a training multiplies; what is trained stays in float32.

bfloat16 keeps the range of float32, so a loss needs no scaling (Kalamkar et al., arXiv 1905.12322).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field

Precision: TypeAlias = Literal["float32", "bfloat16"]
PRECISION: Any = Field(
    default="float32",
    description="of activations and products in training; bfloat16 is several times as fast where the processor "
    "multiplies it (AVX-512 BF16, AMX), and slower elsewhere; what is trained stays in float32",
)
"""The option of every method that trains by gradients."""


def in_precision(precision: Precision) -> AbstractContextManager[None]:
    """Products below this take their operands in `precision`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
