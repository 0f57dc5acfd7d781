"""What holds for every test: one compute thread for each worker, no network, caches of its own, steady examples."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Before torch is imported: workers that each use all cores stand in each other's way.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOSSAMER_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # whether this user has a token for clusters or not
if "GOSSAMER_HOME" not in os.environ:  # the workers inherit the folder of the process that started them
    os.environ["GOSSAMER_HOME"] = tempfile.mkdtemp(prefix="gossamer-tests-")
    atexit.register(shutil.rmtree, os.environ["GOSSAMER_HOME"], ignore_errors=True)

from hypothesis import settings  # noqa: E402

settings.register_profile("gossamer", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("gossamer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each instruction set; those that this machine lacks are skipped by name."""
    from gossamer.kernels import cpu

    if request.param not in cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)
