"""Every method on a tiny model of every family: what it makes computes nearly the same, or it refuses and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import parse_recipe
from gossamer.compress.registry import METHODS
from gossamer.errors import CompressionError
from gossamer.model.decoder import Decoder
from tiny_families import VARIANTS, make_family

FAMILIES = [name for name in VARIANTS if "-" not in name]
GRID = {"bits": 8, "group_size": 32}
RTN = {"method": "rtn", **GRID}
STAGES: dict[str, list[dict[str, Any]]] = {
    "rotate": [{"method": "rotate"}, RTN],
    "smoothquant": [{"method": "smoothquant", "points": "all"}],
    "llm-int8": [{"method": "llm-int8"}],
    "hqq": [{"method": "hqq", **GRID, "iterations": 2}],
    "awq": [{"method": "awq", **GRID, "steps": 3}],
    "omniquant": [{"method": "omniquant", **GRID, "steps": 3}],
    "signround": [{"method": "signround", **GRID, "steps": 3}],
    "efficientqat": [{"method": "efficientqat", **GRID, "steps": 3}],
    "squeezellm": [{"method": "squeezellm", "outlier_share": 0.05}],
    "scales": [RTN, {"method": "scales", "steps": 2}],
    "qat": [RTN, {"method": "qat", "steps": 2}],
    "qlora": [RTN, {"method": "qlora", "steps": 2}],
}
CUT = {"ratio": 0.1, "heads": "keep", "multiple": 1}
STAGES |= {name: [{"method": name, **CUT}] for name in ("flap", "wanda-sp", "llm-pruner")}
STAGES["slicegpt"] = [{"method": "slicegpt", "ratio": 0.05, "multiple": 1}]
STAGES["depth"] = [{"method": "depth", "ratio": 0.3}]
SPARSE = {"method": "magnitude", "sparsity": 0.1}
STAGES |= {name: [{"method": name, "sparsity": 0.1}] for name in ("magnitude", "wanda", "sparsegpt")}
STAGES |= {name: [{"method": name, "rank": 24, "multiple": 8}] for name in ("svd", "asvd", "svd-llm")}
STAGES["tensor-train"] = [{"method": "tensor-train", "ratio": 0.9}]
STAGES["recover-local"] = [SPARSE, {"method": "recover-local", "tokens": 96}]
STAGES["distill"] = [SPARSE, {"method": "distill", "tokens": 96}]
STAGES["lora"] = [{"method": "wanda-sp", **CUT}, {"method": "lora", "tokens": 96}]
UNTURNABLE = {"gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "bloom"}
REFUSED = {"rotate": UNTURNABLE, "slicegpt": UNTURNABLE}
"""Whose norms do not commute with a rotation."""
BOUNDS = {"squeezellm": 0.6, "flap": 0.7, "wanda-sp": 0.7, "llm-pruner": 0.7, "slicegpt": 1.0, "depth": 1.5}
BOUNDS |= dict.fromkeys(("magnitude", "wanda", "sparsegpt", "recover-local", "distill"), 0.4) | {"lora": 0.7}
BOUNDS |= dict.fromkeys(("svd", "asvd", "svd-llm", "tensor-train"), 1.3)
"""Of the error of logits over their spread, where the method has no 8 bits; random weights are of full rank, and logits
that have nothing to do with each other are 1.41 apart."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> tuple[str, Path, Decoder]:
    folder = tmp_path_factory.mktemp("family") / "model"
    make_family(folder, request.param)
    return request.param, folder, load_decoder(open_checkpoint(folder))


def calibration() -> Calibration:
    tokens = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 4, "length": 24, "seed": 0}
    return Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_a_family(model, method, tmp_path) -> None:
    family, folder, original = model
    stages = STAGES.get(method, [{"method": method, **GRID}])
    recipe = parse_recipe({"version": 1, "name": "r", "stages": stages}, "test")
    if family in REFUSED.get(method, ()):
        with pytest.raises(CompressionError, match=f"the family {family} cannot"):
            compress(open_checkpoint(folder), recipe, tmp_path / "out", calibration())
        return
    compress(open_checkpoint(folder), recipe, tmp_path / "out", calibration())
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(2))
    expected = original(tokens)
    found = load_decoder(open_checkpoint(tmp_path / "out"))(tokens)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < BOUNDS.get(method, 0.1)
