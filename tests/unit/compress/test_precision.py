"""In what floats a training multiplies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.compress.precision import Precision, in_precision


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [
        ("float32", "avx512_bf16", torch.float32),
        ("bfloat16", "none", torch.bfloat16),
        ("auto", "none", torch.float32),
        ("auto", "avx512_bf16", torch.bfloat16),
        ("auto", "amx_bf16", torch.bfloat16),
        ("auto", "bf16", torch.bfloat16),
    ],
)
def test_products_are_taken_in_what_was_asked_for(
    precision: Precision, capability: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False, capability: True})
    a = torch.ones(2, 2)
    with in_precision(precision):
        assert (a @ a).dtype == expected
    assert (a @ a).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's list of the processor's instructions")
def test_auto_multiplies_in_bfloat16_where_this_processor_does() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32
    with in_precision("auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
