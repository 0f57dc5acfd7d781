"""Structured pruning of every model family: what does nothing goes without a trace, and transformers reads the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pruning import difference, logits, tokens

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.save import save_folder
from gossamer.compress.prune.cut import CutCheckpoint
from gossamer.errors import CompressionError
from gossamer.model import FAMILIES as ROWS
from tiny_families import VARIANTS, make_family

FAMILIES = [name for name in VARIANTS if "-" not in name]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> tuple[str, Path]:
    """A model whose last layer adds nothing, nor the first key-value head and 32 channels of the others."""
    folder = tmp_path_factory.mktemp("family") / "model"
    oracle = make_family(folder, request.param)
    base = open_checkpoint(folder)
    family, layer = ROWS[base.config.family], base.config.layers[0]
    width = layer.head_dim * layer.group
    state = oracle.state_dict()
    for i in range(3):
        o, down = (state[f"{family.module(role, i)}.weight"] for role in ("o", "down"))
        rows, columns = (width, 32) if i < 2 else (o.numel(), down.numel())
        for weight, count in ((o, rows), (down, columns)):
            (weight if family.transposed else weight.T)[:count] = 0
        if i == 2 and layer.has_bias("o"):
            state[f"{family.module('o', i)}.bias"].zero_()
        if i == 2 and layer.has_bias("down"):
            state[f"{family.module('down', i)}.bias"].zero_()
    oracle.save_pretrained(folder)
    return request.param, folder


def bias(checkpoint, role: str, i: int) -> torch.Tensor:
    """[hidden] what it is, zeros if it has none."""
    name = f"{ROWS[checkpoint.config.family].module(role, i)}.bias"
    return checkpoint.tensor(name) if name in checkpoint.names() else torch.zeros(checkpoint.config.hidden_size)


def channels(checkpoint, dead: int) -> torch.Tensor:
    return torch.arange(dead, checkpoint.config.layers[0].ffn_width)


def test_layers_and_channels_go_without_a_trace_and_transformers_reads_the_rest(model, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    family, folder = model
    base = open_checkpoint(folder)
    made = {"layers": torch.tensor([0, 1])} | {f"{i}.channels": channels(base, 32) for i in (0, 1)}
    cut = CutCheckpoint(base, made)
    assert difference(logits(cut), logits(base)) < 1e-4
    assert ("gossamer_layers" in cut.hf_config) == (family == "bloom")  # which cannot say how wide its layers are
    if family == "bloom":
        return
    save_folder(cut, tmp_path / "out")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
        )(tokens()).logits
    from gossamer.checkpoint.load import load_decoder

    assert difference(found, load_decoder(open_checkpoint(tmp_path / "out"))(tokens())) < 1e-4


def test_heads_go_without_a_trace(model, tmp_path) -> None:
    family, folder = model
    base = open_checkpoint(folder)
    layer = base.config.layers[0]
    made = {f"{i}.heads": torch.arange(layer.group, layer.num_heads) for i in (0, 1)}
    if family == "bloom":
        with pytest.raises(CompressionError, match="layer 0: heads of a bloom model cannot go"):
            CutCheckpoint(base, made)
        return
    cut = CutCheckpoint(base, made)
    assert difference(logits(cut), logits(base)) < 1e-4
    assert "gossamer_layers" in cut.hf_config  # the last layer has all of its heads
    alike = CutCheckpoint(base, {**made, "layers": torch.tensor([0, 1])})
    plain = family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
    assert ("gossamer_layers" not in alike.hf_config) == plain


@pytest.mark.parametrize("roles", [("o",), ("down",), ("o", "down")], ids="+".join)
def test_biases_are_said_plainly_where_the_family_has_words_for_them(model, roles) -> None:
    family, folder = model
    base = open_checkpoint(folder)
    made = {f"{i}.{role}.bias": bias(base, role, i) for i in range(3) for role in roles}
    cut = CutCheckpoint(base, made, plain=True)
    assert difference(logits(cut), logits(base)) < 1e-4
    known = {role for group in ROWS[family].biases.values() for role in group}
    assert ("gossamer_layers" not in cut.hf_config) == (set(roles) <= known)
