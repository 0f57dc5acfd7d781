"""Depth pruning: layers that do nothing go first, both measures are their formulas, and steps outlive a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import decide, difference, logits, make_model, prune, tokens
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.prune import depth
from gossamer.compress.prune.cut import CutCheckpoint
from gossamer.compress.prune.depth import Depth, influence
from gossamer.compress.source import Source
from gossamer.compress.units import Units

GREEDY = {"method": "depth", "greedy": True, "ratio": 0.4}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Five layers, of which the second and the fourth do nothing."""
    return make_model(tmp_path / "model", layers=(1, 3), num_hidden_layers=5)


@pytest.mark.parametrize("stage", [{"method": "depth", "ratio": 0.4}, GREEDY], ids=["influence", "greedy"])
def test_layers_that_do_nothing_go_without_a_trace(model: Path, tmp_path: Path, stage: dict[str, Any]) -> None:
    pruned, base = prune(model, tmp_path / "out", stage), open_checkpoint(model)
    assert pruned.config.layers == base.config.layers[:3]
    assert difference(logits(pruned), logits(base)) < 1e-6
    kept = [pruned.tensor(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)]
    wanted = [base.tensor(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 2, 4)]
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))


def test_influence_is_one_less_the_mean_cosine_of_inputs_and_outputs(model: Path) -> None:
    decoder, stream = load_decoder(open_checkpoint(model), torch.float64), list[Tensor]()
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, args, output: stream.extend((args[0], output)))
    decoder(tokens())
    pairs = [(stream[2 * i].flatten(0, 1), stream[2 * i + 1].flatten(0, 1)) for i in range(5)]
    wanted = torch.stack([1 - ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean() for x, y in pairs])
    found = influence(Source(open_checkpoint(model)), tokens(), lambda *_: None)
    assert (found - wanted).abs().max() < 1e-5
    assert decide(model, Depth, ratio=0.4)["layers"].tolist() == [0, 2, 4]


def test_divergence_is_that_of_the_model_without_each_layer(model: Path) -> None:
    base, kept = open_checkpoint(model), [0, 2, 4]
    source = Source(base)
    found = depth.divergences(source, kept, tokens(), depth.Judge(source, tokens()), lambda *_: None)
    truth = load_decoder(base, torch.float64)(tokens()).double().log_softmax(-1)
    for n, gone in enumerate(kept):
        cut = CutCheckpoint(base, {"layers": torch.tensor([i for i in kept if i != gone])})
        logp = load_decoder(cut, torch.float64)(tokens()).double().log_softmax(-1)
        wanted = (truth.exp() * (truth - logp)).sum(-1).mean()
        assert found[n] == pytest.approx(float(wanted), rel=1e-4)


def test_greedy_steps_outlive_a_kill(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prune(model, tmp_path / "whole", GREEDY)
    write, measured, measure = Units.write, list[int](), depth.divergences

    class Stopped(Exception):
        pass

    def write_and_stop(self: Units, *args: Any, **named: Any) -> None:
        write(self, *args, **named)
        raise Stopped

    def counted(source: Source, kept: list[int], *args: Any) -> Tensor:
        measured.append(len(kept))
        return measure(source, kept, *args)

    monkeypatch.setattr(Units, "write", write_and_stop)
    monkeypatch.setattr(depth, "divergences", counted)
    for _ in range(3):
        with pytest.raises(Stopped):
            prune(model, tmp_path / "out", GREEDY)
    prune(model, tmp_path / "out", GREEDY)
    assert measured == [5, 4]  # no step is taken twice
    for path in whole.path.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_layer_method_behind_it_compares_with_what_the_layers_gave(model: Path, tmp_path: Path) -> None:
    """A method that trains blocks has the original's outputs in the place of each layer that is left."""
    stages = ({"method": "depth", "ratio": 0.4}, {"method": "signround", "bits": 8, "group_size": 32, "steps": 2})
    pruned = prune(model, tmp_path / "out", *stages)
    assert pruned.config.num_layers == 3
    assert (logits(pruned) - logits(open_checkpoint(model))).std() < 0.2 * logits(pruned).std()
