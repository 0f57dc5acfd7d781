"""Packed embeddings and heads: what rounds them, and by which statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gossamer.checkpoint import open_checkpoint
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.pipeline import compress
from gossamer.compress.quantize.gptq import GPTQ, GPTQOptions
from gossamer.compress.recipe import parse_recipe
from gossamer.formats import Integer
from tiny_llama import make_folder

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
GRID = {"bits": 3, "group_size": 32, "symmetric": False}
FORM = Integer(3, 32, symmetric=False)
TOKENS = torch.randint(0, 300, (32, 40), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BY_INPUTS = [
    {"method": "gptq"},
    {"method": "efficientqat", "clip": "mse", "steps": 0},
    {"method": "signround", "clip": "mse", "steps": 0},
]


def made(folder: Path, out: Path, stage: dict[str, Any]) -> Path:
    recipe = parse_recipe({"version": 1, "name": "r", "stages": [{**GRID, **stage}]}, "test")
    record = {"kind": "self", "sha256": token_hash(TOKENS), "sequences": 32, "length": 40, "seed": 0}
    calibration = Calibration(TOKENS, {**record, "line_hashes": [], "details": {"source": "self"}})
    compress(open_checkpoint(folder), recipe, out, calibration)
    return out


def head_inputs(folder: Path) -> Tensor:
    """Sum of X^T X [hidden, hidden] in float64 over what transformers' model gives its head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        x = model.model(TOKENS).last_hidden_state.flatten(0, 1).double()
    return x.T @ x


def error(folder: Path, small: Path, name: str, hessian: Tensor) -> float:
    """tr(E H E^T) of one tensor."""
    lost = (open_checkpoint(small).tensor(name) - open_checkpoint(folder).tensor(name)).double()
    return float(((lost @ hessian) * lost).sum())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", BY_INPUTS, ids=lambda stage: stage["method"])
def test_a_head_is_rounded_by_what_it_reads(tmp_path: Path, stage: dict[str, Any], tied: bool) -> None:
    folder = make_folder(tmp_path / "model", tie_word_embeddings=tied, **SHAPE)
    stage, name = {**stage, "head": GRID}, EMBEDDING if tied else HEAD
    hessian = head_inputs(folder)
    nearest = made(folder, tmp_path / "nearest", {"method": "rtn", "clip": "mse", "head": GRID})
    by_inputs = made(folder, tmp_path / "by-inputs", stage)
    found = error(folder, by_inputs, name, hessian)
    assert found < 0.92 * error(folder, nearest, name, hessian)
    wanted = hessian + (0.3 * hessian.diagonal().mean() * torch.eye(64) if tied else 0)
    weight = open_checkpoint(folder).tensor(name)
    lost = GPTQ(GPTQOptions(clip="mse")).quantize(weight, FORM, wanted.float()).dequantize() - weight
    assert found == pytest.approx(float(((lost.double() @ hessian) * lost).sum()), rel=0.02)


def test_the_rows_of_a_tied_embedding_count_too(tmp_path: Path) -> None:
    """Its codes lose less by themselves than those of a head that nothing else reads."""
    lost = {}
    for tied in (True, False):
        folder = make_folder(tmp_path / f"model-{tied}", tie_word_embeddings=tied, **SHAPE)
        small = made(folder, tmp_path / f"small-{tied}", {"method": "gptq", "head": GRID})
        name = EMBEDDING if tied else HEAD
        weight = open_checkpoint(folder).tensor(name)
        lost[tied] = error(folder, small, name, torch.eye(64).double()) / float(weight.double().square().sum())
    assert lost[True] < lost[False]


def test_an_untied_embedding_goes_to_the_nearest_codes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", tie_word_embeddings=False, **SHAPE)
    by_inputs = made(folder, tmp_path / "by-inputs", {"method": "gptq", "embedding": GRID, "head": GRID})
    nearest = made(folder, tmp_path / "nearest", {"method": "rtn", "clip": "mse", "embedding": GRID, "head": GRID})
    same, other = (
        torch.equal(*(open_checkpoint(path).tensor(name) for path in (by_inputs, nearest)))
        for name in (EMBEDDING, HEAD)
    )
    assert same
    assert not other


def test_training_that_begins_from_rounding_leaves_the_ends_to_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", **SHAPE)
    stage = {"clip": "mse", "embedding": GRID}
    trained = made(folder, tmp_path / "trained", {**stage, "method": "efficientqat", "steps": 1, "start": "rtn"})
    nearest = made(folder, tmp_path / "nearest", {**stage, "method": "rtn"})
    assert torch.equal(*(open_checkpoint(path).tensor(EMBEDDING) for path in (trained, nearest)))
