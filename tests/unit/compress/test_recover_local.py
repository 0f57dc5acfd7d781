"""Local distillation: the losses' formulas, nearer to the original, what stays, kills, divergence, memory, legality."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.blockview import BlockView
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.distill.local import LeastSquares, LocalOptions, RecoverLocal, Student
from gossamer.compress.distill.losses import cosine_distance, relative_error
from gossamer.compress.pipeline import compress
from gossamer.compress.plan import make_plan
from gossamer.compress.recipe import parse_recipe
from gossamer.compress.units import Units
from gossamer.errors import NumericalError, RecipeError
from gossamer.formats import Dense
from gossamer.model.decoder import Block
from random_blocks import make_block, make_inputs, make_rotation, make_view, wide_norms
from tiny_llama import make_folder

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
NARROW = {"method": "wanda-sp", "ratio": 0.25, "heads": "keep", "multiple": 8}
SPARSE = {"method": "magnitude"}
LOW_RANK = {"method": "svd", "ratio": 0.6, "multiple": 4, "min_rank": 4}
LOCAL: dict[str, Any] = {"method": "recover-local", "tokens": 24 * 48, "learning_rate": 0.02, "norm_rate": 2e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("local") / "model", attention_bias=True, **SHAPE)


def tokens(sequences: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 300, (sequences, 24), generator=torch.Generator().manual_seed(seed))


def run(model: Path, out: Path, *stages: dict[str, Any], sequences: int = 24) -> Path:
    text = {"source": "self", "sequences": sequences, "length": 24}
    recipe = parse_recipe({"version": 1, "name": "r", "calibration": text, "stages": list(stages)}, "test")
    record = {"kind": "self", "sha256": token_hash(tokens(sequences)), "sequences": sequences, "length": 24, "seed": 0}
    calibration = Calibration(tokens(sequences), {**record, "line_hashes": [], "details": {"source": "self"}})
    compress(open_checkpoint(model), recipe, out, calibration)
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def error(model: Path, other: Path) -> float:
    """Mean relative squared error of the last hidden states on fresh tokens, in float64."""
    wanted, found = (load_decoder(open_checkpoint(f)).hidden(tokens(8, seed=9)).double() for f in (model, other))
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def damaged_view(bias: bool = True, damage: bool = True, calm: bool = False) -> BlockView:
    """A block with a quarter of its feed-forward channels at zero, that is to give what the whole block gives.

    `calm`: what the feed-forward network adds is small beside the stream, as it is in a trained model.
    """
    original, block = make_block(bias=bias), make_block(bias=bias)
    if calm:
        for each in (original, block):
            each.down.weight *= 0.1
    if damage:
        block.down.weight[:, ::4] = 0
    view = make_view(original, Dense(torch.float32), make_inputs())
    return BlockView(
        block,
        view.x,
        view.target,
        make_rotation(),
        dict.fromkeys(view.roles, Dense(torch.float32)),
        {role: role for role in view.roles},
    )


def test_losses_and_their_gradients_are_those_of_the_formulas() -> None:
    generator = np.random.default_rng(0)
    y, t = generator.normal(size=(3, 5, 16)), generator.normal(size=(3, 5, 16))
    size = np.linalg.norm(t, axis=-1, keepdims=True)
    value = torch.tensor(y, dtype=torch.float32, requires_grad=True)
    loss = relative_error(value, torch.tensor(t).float())
    np.testing.assert_allclose(loss.detach(), ((y - t) ** 2).sum(-1) / (t**2).sum(-1), rtol=1e-5)
    loss.sum().backward()
    np.testing.assert_allclose(value.grad, 2 * (y - t) / size**2, rtol=1e-4, atol=1e-6)
    value.grad = None
    loss = cosine_distance(value, torch.tensor(t).float())
    length = np.linalg.norm(y, axis=-1, keepdims=True)
    cosine = (y * t).sum(-1, keepdims=True) / length / size
    np.testing.assert_allclose(loss.detach(), 1 - cosine[..., 0], rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    np.testing.assert_allclose(value.grad, -(t / size - cosine * y / length) / length, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("role", ["o", "down"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_least_squares_weight_and_bias_are_those_of_the_normal_equations(
    monkeypatch: pytest.MonkeyPatch, role: Any, bias: bool
) -> None:
    view = damaged_view(bias)
    rows = torch.arange(4)
    weight, offset = LeastSquares(view, role, rows).solve(1e-3)
    wide_norms(monkeypatch)
    block = view.block.double()
    x, target = view.x[rows].double(), view.target[rows].double()
    mixed = block.mix(block.attn_norm(x), view.rotation)
    h = x + block.o(mixed)
    inputs = mixed if role == "o" else block.gated(block.ffn_norm(h))
    size, columns = target.norm(dim=-1, keepdim=True), inputs.shape[-1]
    left = (torch.cat((inputs, torch.ones_like(size)), -1)[..., : columns + bias] / size).flatten(0, 1)
    right = ((target - block(x, view.rotation)) / size).flatten(0, 1)
    square = left.T @ left
    square[:columns, :columns] += 1e-3 * square.diagonal()[:columns].mean() * torch.eye(columns)
    change = torch.linalg.solve(square, left.T @ right).T
    wanted = getattr(block, role).weight + change[:, :columns]
    assert (weight - wanted).abs().max() < 1e-3 * wanted.abs().max()
    if not bias:
        assert offset is None
        return
    wanted = getattr(block, role).bias + change[:, columns]
    assert (offset - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("role", ["o", "down"])
def test_a_solved_layer_is_kept_only_where_it_serves_sequences_that_it_was_not_solved_for(role: Any) -> None:
    view = damaged_view(calm=True)
    getattr(view.block, role).weight[:, ::3] = 0
    student, training, judging = Student(view), torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5])
    before, weight = student.error(judging), getattr(view.block, role).weight.clone()
    student.solve(role, training, judging)
    assert student.error(judging) < 0.95 * before
    assert not torch.equal(getattr(view.block, role).weight, weight)
    perfect = damaged_view(damage=False)
    student, weight = Student(perfect), getattr(perfect.block, role).weight.clone()
    student.solve(role, training, judging)
    assert torch.equal(student.weights[role](), weight)
    assert torch.equal(getattr(perfect.block, role).weight, weight)


def test_the_gradient_of_a_block_is_that_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight, norm and bias gets one, and it is that of the mean relative error."""
    view, options = damaged_view(), LocalOptions(cosine=0.5)
    student = Student(view)
    student.begin()
    student.loss(torch.tensor([0, 3]), options).backward()
    found = {f"{role}.weight": w.floats["weight"].grad for role, w in student.weights.items()}
    found |= {name: p.grad for name, p in student.parameters.items()}
    wide_norms(monkeypatch)
    block = damaged_view().block.double()
    for parameter in block.parameters():
        parameter.requires_grad_()
    y, t = block(view.x[[0, 3]].double(), view.rotation), view.target[[0, 3]].double()
    part = (y * t).sum(-1) / y.norm(dim=-1) / t.norm(dim=-1)
    ((y - t).square().sum(-1) / t.square().sum(-1) + 0.5 * (1 - part)).mean().backward()
    wanted = {name: p.grad for name, p in block.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert (found[name] - gradient).abs().max() < 2e-3 * gradient.abs().max(), name


@pytest.mark.parametrize("inputs", ["student", "teacher", "mixed"])
@pytest.mark.parametrize("least_squares", [False, True])
def test_a_narrower_model_comes_nearer_to_the_original_on_text_that_it_has_not_seen(
    model: Path, tmp_path: Path, inputs: str, least_squares: bool
) -> None:
    before = error(model, run(model, tmp_path / "cut", NARROW))
    stage = LOCAL | {"inputs": inputs, "least_squares": least_squares}
    assert error(model, run(model, tmp_path / "local", NARROW, stage)) < 0.8 * before


def test_a_block_learns_the_part_of_those_that_went_behind_it(model: Path, tmp_path: Path) -> None:
    shallow = {"method": "depth", "ratio": 0.34}
    before = error(model, run(model, tmp_path / "cut", shallow))
    out = run(model, tmp_path / "local", shallow, LOCAL | {"cosine": 0.2})
    assert len(load_decoder(open_checkpoint(out)).blocks) == 2
    assert error(model, out) < 0.8 * before


@pytest.mark.parametrize("stage", [SPARSE, LOW_RANK], ids=lambda stage: stage["method"])
def test_other_forms_of_float_are_trained_as_they_are(model: Path, tmp_path: Path, stage: dict[str, Any]) -> None:
    """Zeros stay zeros, factors stay factors, and the outputs come nearer to the original's."""
    before, after = run(model, tmp_path / "a", stage), run(model, tmp_path / "b", stage, LOCAL)
    assert error(model, after) < 0.9 * error(model, before)
    first, last = weights(before), weights(after)
    assert {name: (t.dtype, t.shape) for name, t in first.items()} == {
        name: (t.dtype, t.shape) for name, t in last.items()
    }
    masks = [name for name in first if name.endswith("weight_mask")]
    assert len(masks) == (0 if stage is LOW_RANK else 21)
    assert all(torch.equal(first[name], last[name]) for name in masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_norms_and_biases_of_every_block_are_learned_and_stored_in_the_models_dtype(
    model: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (model / "config.json").write_text(json.dumps(config))
    local = LOCAL | {"least_squares": False, "learning_rate": 1e-3, "norm_rate": 1e-4, "check_every": 4}
    before, after = weights(run(model, tmp_path / "a", NARROW)), weights(run(model, tmp_path / "b", NARROW, local))
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    assert {t.dtype for t in after.values()} == {dtype}
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same >= {"model.embed_tokens.weight", "model.norm.weight"}
    if dtype == torch.float32:  # of a bfloat16, a small step may be nothing
        assert len(same) == 2
    assert not {name for name in same if name.endswith("proj.weight")}


def test_a_training_that_diverges_changes_nothing(model: Path, tmp_path: Path) -> None:
    wild = LOCAL | {"learning_rate": 1e9, "norm_rate": 1e9, "tokens": 24 * 20, "least_squares": False}
    before, after = weights(run(model, tmp_path / "a", NARROW)), weights(run(model, tmp_path / "b", NARROW, wild))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_training_that_diverges_leaves_the_least_squares() -> None:
    views = [damaged_view(), damaged_view()]
    RecoverLocal(LocalOptions(tokens=0)).compress(views[0])
    RecoverLocal(LocalOptions(tokens=40 * 20, learning_rate=1e9, norm_rate=1e9)).compress(views[1])
    for role in views[0].roles:
        assert torch.equal(views[0].stored[role]["weight"], views[1].stored[role]["weight"]), role


def test_training_ends_once_the_sequences_kept_back_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    view = damaged_view()
    losses: list[int] = []
    loss = Student.loss
    monkeypatch.setattr(Student, "loss", lambda *a: losses.append(1) or loss(*a))
    still = LocalOptions(learning_rate=0.0, norm_rate=0.0, check_every=2, patience=3, tokens=40 * 500)
    RecoverLocal(still).compress(view)
    assert len(losses) == 6
    losses.clear()
    RecoverLocal(LocalOptions(tokens=40 * 7 + 39, check_every=100)).compress(damaged_view())
    assert len(losses) == 7  # the budget is never exceeded


def test_stopped_after_every_unit_in_turn_it_resumes_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (NARROW, LOCAL | {"inputs": "mixed", "tokens": 24 * 20})
    whole = files(run(model, tmp_path / "whole", *stages))

    class Stopped(Exception):
        pass

    write, stops = Units.write, 0

    def write_and_stop(self: Units, *arguments: Any, **named: Any) -> None:
        write(self, *arguments, **named)
        raise Stopped

    monkeypatch.setattr(Units, "write", write_and_stop)
    while not (tmp_path / "out").exists():
        try:
            run(model, tmp_path / "out", *stages)
        except Stopped:
            stops += 1
        assert stops < 10
    assert stops == 4  # the decision, and three blocks
    assert files(tmp_path / "out") == whole


def test_one_block_at_a_time_is_in_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    loss = Student.loss

    def counting(*arguments: Any) -> Tensor:
        counts.append(sum(type(o) is Block for o in gc.get_objects()))
        return loss(*arguments)

    monkeypatch.setattr(Student, "loss", counting)
    gc.collect()
    there = sum(type(o) is Block for o in gc.get_objects())
    run(model, tmp_path / "out", NARROW, LOCAL | {"tokens": 24 * 4, "inputs": "mixed"})
    assert len(counts) == 12
    assert max(counts) - there == 1


def test_inputs_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    view = damaged_view()
    view.x[0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^o: "):
        RecoverLocal(LocalOptions()).compress(view)


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([LOCAL], r"stage 1 \(recover-local\) brings back what earlier stages lost, but it is the first"),
        ([NARROW, {"method": "rtn"}, LOCAL], r"stage 2 \(rtn\) has quantized"),
        ([{"method": "rotate"}, NARROW, LOCAL], r"stage 3 .* but stage 1 \(rotate\) has changed what the stream"),
    ],
)
def test_orders_that_make_no_sense_are_refused(stages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_recipe({"version": 1, "name": "r", "stages": stages}, "test")


@pytest.mark.parametrize("bad", [{"tokens": -1}, {"batch_size": 0}, {"inputs": "both"}, {"patience": 0}, {"step": 1}])
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LocalOptions(**bad)


def test_the_plan_counts_the_originals_inputs_and_what_adam_holds(model: Path) -> None:
    config = open_checkpoint(model).config

    def peak(**options: Any) -> int:
        stages = [NARROW, LOCAL | options]
        recipe = parse_recipe({"version": 1, "name": "r", "stages": stages}, "test")
        return make_plan(config, recipe, torch.bfloat16).phases["recover-local"]

    assert peak(inputs="mixed") - peak() == 4 * 32 * 512 * 32
    assert peak() - peak(least_squares=False) == 3 * 4 * 41**2
