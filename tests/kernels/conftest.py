"""Every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gossamer.kernels import cpu


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each instruction set; those that this machine lacks are skipped by name."""
    if request.param not in cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)
