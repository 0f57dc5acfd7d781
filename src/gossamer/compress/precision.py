"""In what floats a training multiplies; what is trained stays in float32.

bfloat16 keeps the range of float32, so a loss needs no scaling (Kalamkar et al., arXiv 1905.12322).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field

Precision: TypeAlias = Literal["float32", "bfloat16", "auto"]
PRECISION: Any = Field(
    default="float32",
    description="of activations and products in training; bfloat16 is several times as fast where the processor "
    "multiplies it (AVX-512 BF16, AMX), and slower elsewhere; auto: bfloat16 there, float32 elsewhere, so that the "
    "bytes depend on the machine; what is trained stays in float32",
)
"""The option of every method that trains by gradients."""
MULTIPLIES_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""What PyTorch calls the instructions, on x86 and on ARM."""


def in_precision(precision: Precision) -> AbstractContextManager[None]:
    """Products below this take their operands in `precision`."""
    rounded = precision == "bfloat16" or (precision == "auto" and _multiplies_bfloat16())
    return torch.autocast("cpu", torch.bfloat16, enabled=rounded, cache_enabled=False)


def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in MULTIPLIES_BFLOAT16)
