"""LLM-Pruner: importance is weight times gradient by what goes together, and a kill anywhere changes no byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning import CHANNEL, GROUP, block_weights, calibration, difference, logits, make_model, prune, recipe, tokens
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.pipeline import compress
from gossamer.compress.units import Units
from gossamer.errors import CompressionError, RecipeError
from gossamer.model.decoder import Block
from random_blocks import wide_norms

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def gradients(model: Path) -> dict[tuple[int, str], Tensor]:
    """Gradient [sequences, out, in] of each sequence's mean loss, float64, by the whole model at once."""
    decoder = load_decoder(open_checkpoint(model), torch.float64)
    weights = {(i, r): getattr(b, r).weight.requires_grad_() for i, b in enumerate(decoder.blocks) for r in ROLES}
    found: dict[tuple[int, str], list[Tensor]] = {key: [] for key in weights}
    for row in tokens():
        x, rotation = decoder.embed(row.unsqueeze(0)), decoder.rotation(torch.arange(len(row)).unsqueeze(0))
        for block in decoder.blocks:
            x = Block.forward(block, x, rotation)
        F.cross_entropy(F.linear(decoder.final_norm(x), decoder.head.weight)[0, :-1], row[1:]).backward()
        for key, weight in weights.items():
            found[key].append(weight.grad)
            weight.grad = None
    return {key: torch.stack(rows) * weights[key].detach() for key, rows in found.items()}


def importance(salience: dict[tuple[int, str], Tensor], i: int, role: str, kind: str) -> Tensor:
    """[units] of a weight: rows, or columns of o and down."""
    axis = 1 if role in ("o", "down") else 2
    if kind == "element":
        return salience[i, role].mean(0).abs().sum(axis - 1)
    return salience[i, role].sum(axis).abs().mean(0)


@pytest.mark.parametrize("kind", ["element", "vector"])
def test_what_goes_is_what_the_formula_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = make_model(tmp_path / "model")
    stage = {"method": "llm-pruner", "ratio": 0.25, "multiple": 1, "importance": kind, "spare_first": 1}
    decided: list[dict[str, Tensor]] = []
    write = Units.write

    def noted(self: Units, unit: str, tensors: dict[str, Tensor], *args: Any, **named: Any) -> None:
        decided.extend([tensors] if unit == "decision" else [])
        write(self, unit, tensors, *args, **named)

    monkeypatch.setattr(Units, "write", noted)
    pruned = prune(model, tmp_path / "out", stage)
    wide_norms(monkeypatch)
    salience = gradients(model)
    assert len(decided[0]["0.channels"]) == 96
    assert len(decided[0]["0.heads"]) == 6
    for i in (1, 2):
        score = {role: importance(salience, i, role, kind) for role in ROLES}
        channels = decided[0][f"{i}.channels"].long()
        sums = score["gate"] + score["up"] + score["down"]
        assert torch.equal(channels, sums.argsort(descending=True)[: len(channels)].sort().values)
        groups = sum(score[role].view(3, -1).sum(1) for role in ("q", "k", "v", "o"))
        heads = {int(h) // 2 for h in decided[0][f"{i}.heads"]}
        assert heads == set(groups.argsort(descending=True)[: len(heads)].tolist())
        assert len(heads) < 3
    total = block_weights(open_checkpoint(model))
    assert abs(total - block_weights(pruned) - 0.25 * total) <= 2 * CHANNEL


@pytest.mark.parametrize("kind", ["element", "vector"])
def test_what_the_loss_does_not_feel_goes_without_a_trace(tmp_path: Path, kind: str) -> None:
    """Dead columns of o and down leave no gradient in what they read."""
    model = make_model(tmp_path / "model", {i: ([i], range(i, 96, 3)) for i in range(3)})
    stage = {"method": "llm-pruner", "ratio": (GROUP + 32 * CHANNEL) / (3 * GROUP + 96 * CHANNEL), "uniform": True}
    pruned = prune(model, tmp_path / "out", {**stage, "importance": kind})
    assert pruned.config.layers[0].num_kv_heads == 2
    assert difference(logits(pruned), logits(open_checkpoint(model))) < 1e-5


def test_a_kill_after_any_block_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stage = make_model(tmp_path / "model"), {"method": "llm-pruner", "ratio": 0.3}
    whole, write = prune(model, tmp_path / "whole", stage), Units.write

    class Stopped(Exception):
        pass

    def write_and_stop(self: Units, *args: Any, **named: Any) -> None:
        write(self, *args, **named)
        raise Stopped

    monkeypatch.setattr(Units, "write", write_and_stop)
    stops = 0
    while not (tmp_path / "out").exists():
        try:
            prune(model, tmp_path / "out", stage)
        except Stopped:
            stops += 1
        assert stops < 12
    assert stops == 7  # of three blocks each the summary and the slope, and the decision
    for path in whole.path.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_spared_layers_must_leave_enough_to_prune(tmp_path: Path) -> None:
    model = open_checkpoint(make_model(tmp_path / "model"))
    for spared in (2, 3, 4):
        stage = {"method": "llm-pruner", "ratio": 0.4, "spare_last": spared}
        with pytest.raises(CompressionError, match=f"cannot go from {max(3 - spared, 0)} of 3 layers"):
            compress(model, recipe(stage), tmp_path / "out", calibration())
    with pytest.raises(RecipeError, match="spared layers would be unlike the others"):
        recipe({"method": "llm-pruner", "uniform": True, "spare_first": 1})
