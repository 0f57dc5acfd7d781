"""Sparse models in the cpu backend: held with their zeros or without, they give the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_batches import check, random_steps
from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import parse_recipe
from gossamer.engine import packing
from gossamer.engine.backend import Batch
from gossamer.engine.cpu import CpuBackend
from gossamer.formats import Integer, Sparse
from tiny_llama import make_folder

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
PRUNE: dict[str, Any] = {"method": "magnitude", "layers": {"k": 0}}
"""k is whole: q, k and v are not alike."""
INT8 = {"method": "rtn", "bits": 8, "group_size": "channel"}
INT4 = {"method": "rtn", "bits": 4, "group_size": 32}


def made(tmp_path: Path, *stages: dict[str, Any]) -> Checkpoint:
    source = open_checkpoint(str(make_folder(tmp_path / "model", **SHAPE, torch_dtype="bfloat16")))
    recipe = parse_recipe({"version": 1, "name": "r", "stages": list(stages)}, "test")
    return open_checkpoint(str(compress(source, recipe, tmp_path / "out").path))


def logits(backend: CpuBackend) -> torch.Tensor:
    """Of 20 tokens of one sequence."""
    backend.reserve(2)
    ints = partial(np.array, dtype=np.int32)
    return backend.forward(Batch(ints(range(2, 22)), ints([0, 20]), ints([20]), ints([[0, 1]]), ints(range(20))))


@pytest.mark.parametrize("stages", [(PRUNE,), (PRUNE, INT8)], ids=["bf16", "int8"])
@pytest.mark.parametrize("activations", ["exact", "auto"])
def test_weights_without_their_zeros_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[dict[str, Any], ...], activations: Any
) -> None:
    checkpoint = made(tmp_path, *stages)
    found = {}
    for name, held in (("squeezed", packing.squeezable), ("filled", lambda _: False)):
        monkeypatch.setattr(packing, "squeezes", held)
        backend = CpuBackend(checkpoint, activations=activations, kv_dtype="fp32", threads=2)
        found[name] = logits(backend), backend.weight_bytes, backend.describe()
        assert packing.expansion(checkpoint) == 0 if name == "squeezed" else packing.expansion(checkpoint) > 0
        if activations == "exact":
            check(backend, load_decoder(checkpoint), random_steps(backend.config, 3), 1e-4)
    assert torch.equal(found["squeezed"][0], found["filled"][0])
    assert found["squeezed"][1] < found["filled"][1]
    assert "with their zeros" not in found["squeezed"][2]
    assert "sparse50 weights held with their zeros" in found["filled"][2]


def test_forms_that_no_kernel_fills_up_are_held_with_their_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "squeezes", packing.squeezable)
    checkpoint = made(tmp_path, PRUNE, INT4)
    backend = CpuBackend(checkpoint, activations="exact", kv_dtype="fp32", threads=2)
    assert "int4-g32-sparse50 weights held with their zeros" in backend.describe()
    check(backend, load_decoder(checkpoint), random_steps(backend.config, 3), 1e-4)
    whole = sum(Integer(4, 32).nbytes(checkpoint.shape(n)) for n in checkpoint.names() if is_sparse(checkpoint, n))
    stored = sum(checkpoint.nbytes(n) for n in checkpoint.names() if is_sparse(checkpoint, n))
    assert packing.expansion(checkpoint) == whole - stored


def is_sparse(checkpoint: Checkpoint, name: str) -> bool:
    return isinstance(checkpoint.format(name), Sparse)
