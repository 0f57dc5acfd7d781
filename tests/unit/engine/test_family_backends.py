"""Both backends compute what the Decoder computes, for a tiny model of every family: whole prompts, chunks, decodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_batches import check, random_steps
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.engine.cpu import CpuBackend, supports
from gossamer.engine.reference import ReferenceBackend
from gossamer.model.decoder import Decoder
from tiny_families import VARIANTS, make_family


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, tmp_path_factory) -> tuple[Path, Decoder]:
    folder = tmp_path_factory.mktemp("family") / "model"
    make_family(folder, request.param)
    return folder, load_decoder(open_checkpoint(folder))


def test_the_reference_backend(model) -> None:
    folder, oracle = model
    backend = ReferenceBackend.load(open_checkpoint(folder))
    check(backend, oracle, random_steps(backend.config, 1), 1e-4)


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("fp32", 2e-4), ("int8", 1.0)])
def test_the_cpu_backend(isa, model, kv_dtype, tolerance) -> None:
    folder, oracle = model
    checkpoint = open_checkpoint(folder)
    assert supports(checkpoint) is None
    backend = CpuBackend(checkpoint, activations="exact", kv_dtype=kv_dtype, threads=2)
    for seed in (2, 3):
        check(backend, oracle, random_steps(backend.config, seed), tolerance)
