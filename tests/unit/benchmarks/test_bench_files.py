"""The model files that the CPU benchmark writes for its peers hold the weights of the model that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpu_models import RECIPES
from gossamer.checkpoint import open_checkpoint
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import load_recipe
from gossamer.formats import Codes, Integer
from make_gguf import write_gguf
from make_w8a8 import write_w8a8


def test_a_gguf_file_has_the_weights_of_its_folder(tiny_model: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model, tmp_path / "model.gguf")
    folder, file = open_checkpoint(tiny_model), open_checkpoint(tmp_path / "model.gguf")
    assert set(file.names()) == set(folder.names())
    for name in folder.names():
        assert torch.equal(file.tensor(name), folder.tensor(name)), name


def test_a_w8a8_folder_has_the_codes_and_scales_of_its_artifact(tiny_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "bench-int8-body.yaml", RECIPES)
    compress(open_checkpoint(tiny_model), recipe, artifact := tmp_path / "artifact")
    write_w8a8(artifact, tmp_path / "out")
    checkpoint, stored = open_checkpoint(artifact), load_file(tmp_path / "out" / "model.safetensors")
    for name in checkpoint.names():
        form = checkpoint.format(name)
        if isinstance(form, Integer):
            codes = Codes(stored[name], stored[f"{name}_scale"])
            assert torch.equal(codes.dequantize(), checkpoint.tensor(name)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"


@pytest.mark.parametrize("recipe", ["bench-int4", "bench-int8", "bench-int8-body", "bench-int4-rtn"])
def test_the_recipes_of_the_benchmark_are_valid(recipe: str) -> None:
    assert load_recipe(RECIPES / f"{recipe}.yaml", RECIPES).name == recipe
