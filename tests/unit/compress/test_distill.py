"""Recovery end to end: formulas of the divergences, nearer to the original, what may change, kills, early ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress import tune
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.distill.losses import forward_kl, jensen_shannon, reverse_kl
from gossamer.compress.distill.whole import DistillOptions, RecoverOptions, Response, within_budget
from gossamer.compress.floatweight import FloatWeight
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import parse_recipe
from gossamer.compress.tuning import TunedModel
from gossamer.errors import CompressionError, NumericalError, RecipeError, UsageError
from gossamer.formats import Dense, Integer
from tiny_llama import make_folder

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
NARROW = {"method": "wanda-sp", "ratio": 0.25, "heads": "keep", "multiple": 8}
SPARSE = {"method": "magnitude"}
LOW_RANK = {"method": "svd", "ratio": 0.6, "multiple": 4, "min_rank": 4}
DISTILL: dict[str, Any] = {"method": "distill", "learning_rate": 0.01, "norm_rate": 1e-3}
LORA: dict[str, Any] = {"method": "lora", "learning_rate": 2e-3, "norm_rate": 1e-3, "rank": 8}
BOTH = [pytest.param(stage, id=stage["method"]) for stage in (DISTILL, LORA)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("distill") / "model", attention_bias=True, **SHAPE)


def tokens(sequences: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(0, 300, (sequences, 24), generator=torch.Generator().manual_seed(seed))


def run(model: Path, out: Path, *stages: dict[str, Any], sample: Any = None) -> Path:
    text = {"source": "self", "sequences": 48, "length": 24}
    trained = [{"batch_size": 8, "tokens": 8 * 24 * 20, **s} if s in (DISTILL, LORA) else s for s in stages]
    recipe = parse_recipe({"version": 1, "name": "r", "calibration": text, "stages": trained}, "test")
    record = {"kind": "self", "sha256": token_hash(tokens()), "sequences": 48, "length": 24, "seed": 0}
    calibration = Calibration(tokens(), {**record, "line_hashes": [], "details": {"source": "self"}})
    compress(open_checkpoint(model), recipe, out, calibration, sample=sample)
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def divergence(model: Path, other: Path) -> float:
    """Mean KL divergence over fresh tokens, in float64."""
    p, q = (load_decoder(open_checkpoint(f))(tokens(8, 9)).double().log_softmax(-1) for f in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def softmax(x: Any) -> Any:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def kl(p: Any, q: Any) -> Any:
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_and_their_gradients_are_those_of_the_formulas(temperature: float) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(3, 50)) * 4, generator.normal(size=(3, 50)) * 4
    p, q = softmax(a / temperature), softmax(b / temperature)
    m = 0.3 * p + 0.7 * q
    square = temperature**2

    def through(slope: Any) -> Any:
        """The gradient by the logits of sum(f(q)), given df/dq."""
        return square / temperature * q * (slope - (slope * q).sum(-1, keepdims=True))

    cases = [
        (forward_kl, kl(p, q), through(-p / q)),
        (reverse_kl, kl(q, p), through(np.log(q / p) + 1)),
        (
            lambda t, s, temperature: jensen_shannon(t, s, temperature, 0.3),
            0.3 * kl(p, m) + 0.7 * kl(q, m),
            through(0.7 * np.log(q / m)),
        ),
    ]
    for function, value, slope in cases:
        student = torch.tensor(b, requires_grad=True)
        found = function(torch.tensor(a), student, temperature)
        np.testing.assert_allclose(found.detach(), square * value, rtol=1e-9)
        found.sum().backward()
        np.testing.assert_allclose(student.grad, slope, rtol=1e-6, atol=1e-9)
        single = function(torch.tensor(a).float(), torch.tensor(b).float(), temperature)
        np.testing.assert_allclose(single, square * value, rtol=1e-4)


REVERSE = pytest.param(DISTILL | {"loss": "reverse"}, id="reverse")
JENSEN_SHANNON = pytest.param(DISTILL | {"loss": "jensen-shannon", "temperature": 2.0}, id="jensen-shannon")


@pytest.mark.parametrize("tuner", [*BOTH, REVERSE, JENSEN_SHANNON])
def test_a_narrower_model_comes_nearer_to_the_original_on_text_that_it_has_not_seen(
    model: Path, tmp_path: Path, tuner: dict[str, Any]
) -> None:
    before = divergence(model, run(model, tmp_path / "cut", NARROW))
    budget = {"batch_size": 8, "tokens": 8 * 24 * 20}
    out = run(model, tmp_path / "out", NARROW, budget | tuner)
    assert divergence(model, out) < 0.9 * before
    shapes = {name: (t.dtype, t.shape) for name, t in weights(tmp_path / "cut").items()}
    assert {name: (t.dtype, t.shape) for name, t in weights(out).items()} == shapes


@pytest.mark.parametrize("stage", [SPARSE, LOW_RANK], ids=lambda stage: stage["method"])
def test_other_forms_of_float_are_trained_as_they_are(model: Path, tmp_path: Path, stage: dict[str, Any]) -> None:
    before, after = run(model, tmp_path / "a", stage), run(model, tmp_path / "b", stage, DISTILL)
    assert divergence(model, after) < 0.9 * divergence(model, before)
    first, last = weights(before), weights(after)
    assert {name: (t.dtype, t.shape) for name, t in first.items()} == {
        name: (t.dtype, t.shape) for name, t in last.items()
    }
    assert all(torch.equal(first[name], last[name]) for name in first if name.endswith("weight_mask"))
    with pytest.raises(RecipeError, match="lora merges into whole matrices"):
        run(model, tmp_path / "c", stage, LORA)


@pytest.mark.parametrize("tuner", BOTH)
def test_all_weights_learn_but_those_of_embedding_and_head(model: Path, tmp_path: Path, tuner: dict[str, Any]) -> None:
    before, after = weights(run(model, tmp_path / "a", NARROW)), weights(run(model, tmp_path / "b", NARROW, tuner))
    same = {name for name in before if torch.equal(before[name], after[name])}
    biases = {name for name in before if name.endswith("bias")}
    assert same == {"model.embed_tokens.weight"} | (biases if tuner is LORA else set())


@pytest.mark.parametrize("tuner", BOTH)
def test_a_training_that_diverges_changes_nothing(model: Path, tmp_path: Path, tuner: dict[str, Any]) -> None:
    wild = tuner | {"learning_rate": 1e6, "norm_rate": 1e6, "tokens": 24 * 3}
    before, after = weights(run(model, tmp_path / "a", NARROW)), weights(run(model, tmp_path / "b", NARROW, wild))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tuner", BOTH)
def test_a_training_that_is_stopped_at_any_save_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuner: dict[str, Any]
) -> None:
    """The best so far, and for how long nothing was gained, are saved too."""
    wild = tuner | {"tokens": 24 * 8 * 9, "batch_size": 8, "save_every": 2, "check_every": 1}
    stages = (NARROW, wild | {"patience": 4})
    whole = files(run(model, tmp_path / "whole", *stages))

    class Stopped(Exception):
        pass

    save, stops = TunedModel.save, 0

    def save_and_stop(self: TunedModel, *arguments: Any, **named: Any) -> None:
        save(self, *arguments, **named)
        raise Stopped

    monkeypatch.setattr(TunedModel, "save", save_and_stop)
    while not (tmp_path / "out").exists():
        try:
            run(model, tmp_path / "out", *stages)
        except Stopped:
            stops += 1
        assert stops < 10
    assert stops >= 2
    assert files(tmp_path / "out") == whole


def test_training_ends_once_the_sequences_kept_back_gain_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    loss = tune.Objective.loss
    monkeypatch.setattr(tune.Objective, "loss", lambda *a: steps.append(1) or loss(*a))
    worse = LORA | {"learning_rate": 10.0, "check_every": 2, "patience": 2}
    run(model, tmp_path / "out", NARROW, worse)
    assert len(steps) == 4


def test_the_budget_of_tokens_is_never_exceeded() -> None:
    options = RecoverOptions(tokens=1000, batch_size=4)
    assert within_budget(options, 100, 24).steps == 1000 // 96
    assert within_budget(options, 2, 24).steps == 1000 // 48  # a batch has no more than there are
    assert within_budget(RecoverOptions(tokens=None, steps=7), 100, 24).steps == 7


@pytest.mark.parametrize("tuner", BOTH)
def test_codes_are_refused(model: Path, tmp_path: Path, tuner: dict[str, Any]) -> None:
    reason = rf"{tuner['method']} trains float weights, but model\.layers\.0.* is int4"
    with pytest.raises(RecipeError, match=reason):
        run(model, tmp_path / "out", {"method": "rtn", "group_size": 32}, tuner)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["scales", "qat", "qlora"])
def test_what_trains_codes_is_refused_where_there_are_none(model: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(RecipeError, match=rf"{method} trains what scales codes, but model\.layers\.0.* is fp32"):
        run(model, tmp_path / "out", NARROW, {"method": method})
    assert not list(tmp_path.iterdir())


def test_a_float_weight_is_what_is_stored_until_it_is_trained_and_named_when_it_is_not_finite() -> None:
    weight = FloatWeight("layer", Dense(torch.bfloat16), {"weight": torch.randn(4, 6).bfloat16()})
    first = weight()
    assert torch.equal(weight.stored()["weight"].float(), first)
    weight.begin()
    (weight() * 3).sum().backward()
    parameter = weight.floats["weight"]
    assert torch.equal(parameter.grad, torch.full((4, 6), 3.0))
    with torch.no_grad():
        parameter.add_(1e-4)
    assert not torch.equal(weight(), first)  # in float32, what bfloat16 would lose
    with torch.no_grad():
        parameter[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="layer is not finite"):
        weight.stored()
    with pytest.raises(CompressionError, match="layer is stored as int4-g16, not in float"):
        FloatWeight("layer", Integer(4, 16), {})


@pytest.mark.parametrize(
    "bad",
    [
        {"loss": "l2"},
        {"temperature": 0.0},
        {"beta": 0.2},
        {"tokens": -1},
        {"patience": 0},
        {"top_k": 5},
        {"features": 1.0},
        {"features": 1.0, "layers": [[1]]},
        {"features": 1.0, "layers": [[1, 1], [1, 2]]},
    ],
)
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DistillOptions(**bad)


def write_text(folder: Path, sequences: int, length: int, seed: int) -> Tensor:
    """Tokens that the model in a folder writes at temperature 1, without a cache."""
    decoder, generator = load_decoder(open_checkpoint(folder)), torch.Generator().manual_seed(seed)
    found = torch.zeros(sequences, 1, dtype=torch.int64)
    for _ in range(length):
        p = decoder(found, last_only=True)[:, 0].softmax(-1)
        found = torch.cat([found, torch.multinomial(p, 1, generator=generator)], dim=1)
    return found[:, 1:].clone()


ON_POLICY = DISTILL | {"on_policy": 0.5, "refresh": 2, "batch_size": 4, "tokens": 24 * 4 * 5, "save_every": 1}


def test_the_model_in_training_writes_as_it_stands_and_a_killed_run_knows_what_it_wrote(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    students: list[dict[str, Tensor]] = []

    def sample(folder: Path, sequences: int, length: int, seed: int) -> Tensor:
        calls.append((sequences, length, seed - (1 << 32)))
        students.append(weights(folder))
        return write_text(folder, sequences, length, seed)

    before = weights(run(model, tmp_path / "cut", NARROW))
    whole = files(run(model, tmp_path / "whole", NARROW, ON_POLICY, sample=sample))
    assert calls == [(4, 24, 0), (4, 24, 2), (4, 24, 4)]  # refresh * batch_size * on_policy sequences
    assert all(torch.equal(students[0][name], before[name]) for name in before)
    assert not torch.equal(
        students[1]["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )

    class Stopped(Exception):
        pass

    save = TunedModel.save

    def save_and_stop(self: TunedModel, *arguments: Any, **named: Any) -> None:
        save(self, *arguments, **named)
        raise Stopped

    monkeypatch.setattr(TunedModel, "save", save_and_stop)
    stops = 0
    while not (tmp_path / "out").exists():
        try:
            run(model, tmp_path / "out", NARROW, ON_POLICY, sample=write_text)
        except Stopped:
            stops += 1
        assert stops < 10
    assert stops == 4
    assert files(tmp_path / "out") == whole


def test_text_of_its_own_makes_the_model_better_too(model: Path, tmp_path: Path) -> None:
    own = DISTILL | {"on_policy": 1.0, "refresh": 8, "batch_size": 8, "tokens": 8 * 24 * 16}
    before = divergence(model, run(model, tmp_path / "cut", NARROW))
    assert divergence(model, run(model, tmp_path / "own", NARROW, own, sample=write_text)) < 0.95 * before


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_so_many_of_the_sequences_are_the_models_own(share: float) -> None:
    remembered: list[Tensor] = []
    writer: Any = SimpleNamespace(
        sampled=lambda sequences, length, seed: torch.full((sequences, length), 7), remember=remembered.append
    )
    response = Response(DistillOptions(on_policy=share, refresh=50))
    mixed = torch.cat([response._mixed(writer, step, torch.zeros(8, 3).long()) for step in range(100)])
    own = (mixed == 7).all(1)
    assert ((mixed == 0).all(1) | own).all()
    assert abs(float(own.float().mean()) - share) < 0.05  # of 800: over three standard deviations
    assert len(remembered) == 2


def test_text_of_the_model_in_training_needs_an_engine(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="distill learns from what the model in training writes"):
        run(model, tmp_path / "out", NARROW, ON_POLICY)
    assert not list(tmp_path.iterdir())


FEATURES = DISTILL | {"features": 10.0, "layers": [[0, 0], [1, 1]], "tokens": 24 * 8 * 20, "batch_size": 8}


def test_states_behind_chosen_blocks_are_learned_too(model: Path, tmp_path: Path) -> None:
    wanted, errors = stream(model, tokens(8, 9)), []
    for name, tuner in (("plain", DISTILL), ("featured", FEATURES)):
        found = stream(run(model, tmp_path / name, NARROW, tuner), tokens(8, 9))
        errors.append(sum(relative(y, t) for y, t in zip(found, wanted, strict=True)))
    assert errors[1] < 0.95 * errors[0]


def stream(folder: Path, rows: Tensor) -> list[Tensor]:
    """Outputs of each block in turn, in float64."""
    decoder = load_decoder(open_checkpoint(folder))
    x, rotation, found = decoder.embed(rows), decoder.rotation(torch.arange(rows.shape[1]).expand(rows.shape)), []
    for block in decoder.blocks:
        x = block(x, rotation)
        found.append(x.double())
    return found


def relative(y: Tensor, t: Tensor) -> float:
    return float(((y - t).square().sum(-1) / t.square().sum(-1)).mean().detach())


def test_the_feature_term_is_the_formula_through_a_learned_projection(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the original were wider: its states are random ones of 40 columns."""
    wide = torch.randn(3, 48, 24, 40, generator=torch.Generator().manual_seed(3))
    seen: list[tuple[float, float]] = []

    def states(self: TunedModel, rows: Tensor) -> list[Tensor]:
        return list(wide[:2, : len(rows)])

    error = Response._feature_error

    def check(self: Response, model: TunedModel, found: dict[int, Tensor], rows: Tensor) -> Tensor:
        value = error(self, model, found, rows)
        wanted = [
            relative(
                found[i].double() @ model.get_submodule(f"to_{i}").projection.double().T, wide[i, : len(rows)].double()
            )
            for i in (0, 1)
        ]
        seen.append((float(value.detach()), float(sum(wanted)) / 2))
        return value

    watching = TunedModel.watch_teacher
    monkeypatch.setattr(TunedModel, "watch_teacher", lambda self, layers: watching(self, layers) + 8)
    monkeypatch.setattr(TunedModel, "teacher_states", states)
    monkeypatch.setattr(Response, "_feature_error", check)
    run(model, tmp_path / "out", NARROW, FEATURES | {"layers": [[0, 0], [1, 1]], "tokens": 24 * 3, "batch_size": 1})
    assert len(seen) == 3
    for value, wanted in seen:
        assert abs(value - wanted) < 1e-4 * wanted


@pytest.mark.parametrize(("pair", "reason"), [([5, 0], "the model has no block 5"), ([0, 7], "has no block 7")])
def test_a_layer_that_is_not_there_is_named(model: Path, tmp_path: Path, pair: list[int], reason: str) -> None:
    with pytest.raises(CompressionError, match=reason):
        run(model, tmp_path / "out", NARROW, FEATURES | {"layers": [pair]})
