"""The knapsack against all assignments tried, and budgets spent on a tiny model."""

from __future__ import annotations

import hashlib
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress import allocate as allocate_module
from gossamer.compress import sensitivity
from gossamer.compress.allocate import Choice, allocate
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.method import BUDGET_BITS
from gossamer.compress.pipeline import Later, compress
from gossamer.compress.plan import make_plan
from gossamer.compress.recipe import Recipe, load_recipe, parse_recipe
from gossamer.errors import CompressionError, RecipeError, ShapeMismatch
from tiny_llama import make_folder

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}


def random_groups(seed: int, unit: int) -> list[list[Choice]]:
    draw = random.Random(seed)
    groups = []
    for _ in range(5):
        sizes = sorted(draw.randrange(1, 40) for _ in range(draw.randrange(1, 5)))
        groups.append([Choice(unit * n, draw.random() * 40 / n) for n in sizes])
    return groups


def totals(groups: list[list[Choice]], picks: Any) -> tuple[int, float]:
    chosen = [group[i] for group, i in zip(groups, picks, strict=True)]
    return sum(c.nbytes for c in chosen), sum(c.loss for c in chosen)


def least_loss(groups: list[list[Choice]], budget: int) -> float | None:
    """By trying every assignment."""
    every = (totals(groups, picks) for picks in itertools.product(*(range(len(g)) for g in groups)))
    return min((loss for nbytes, loss in every if nbytes <= budget), default=None)


@pytest.mark.parametrize("unit", [1, 4096])
@pytest.mark.parametrize("seed", range(12))
def test_no_assignment_within_the_budget_loses_less(seed: int, unit: int) -> None:
    groups = random_groups(seed, unit)
    for budget in (20 * unit, 60 * unit, 100 * unit + unit // 2, 10_000 * unit):
        best = least_loss(groups, budget)
        if best is None:
            with pytest.raises(CompressionError, match="smallest candidates"):
                allocate(groups, budget)
            continue
        nbytes, loss = totals(groups, allocate(groups, budget))
        assert nbytes <= budget
        assert loss == pytest.approx(best)


@pytest.mark.parametrize("seed", range(12))
def test_a_budget_cut_into_few_units_is_kept_and_nearly_as_good(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate_module, "UNITS", 300)
    groups = random_groups(seed, unit=997)  # a prime, and budgets that no unit divides
    smallest = sum(min(c.nbytes for c in g) for g in groups)
    for budget in (smallest, smallest + 12_345, smallest + 40_000):
        nbytes, loss = totals(groups, allocate(groups, budget))
        assert nbytes <= budget
        assert loss <= 1.3 * (least_loss(groups, budget) or 0.0) + 1e-9


def test_more_budget_never_loses_more() -> None:
    groups = random_groups(3, 1000)
    smallest = sum(min(c.nbytes for c in g) for g in groups)
    losses = [totals(groups, allocate(groups, budget))[1] for budget in range(smallest, smallest + 60_000, 5000)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


# On a model.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "model", torch_dtype="bfloat16", **SHAPE)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))


EMBEDDING = [{"bits": bits, "group_size": 32} for bits in (4, 8)]


def recipe(method: str = "gptq", bits: float = 5.0, **budget: Any) -> Recipe:
    stage = {"method": method, "group_size": 32, "budget": {"bits": bits, "embedding": EMBEDDING, **budget}}
    return parse_recipe({"version": 1, "name": "mixed", "stages": [stage]}, "test")


def calibration() -> Calibration:
    tokens = torch.randint(0, 300, (4, 48), generator=torch.Generator().manual_seed(0))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 4, "length": 48, "seed": 0}
    return Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [4.5, 6.0])
def test_the_artifact_is_within_its_budget_and_uses_most_of_it(
    model: Path, tmp_path: Path, method: str, bits: float
) -> None:
    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe(method, bits), out, calibration())
    found = open_checkpoint(out).bits_per_weight()
    assert 0.93 * bits < found <= bits


def test_a_replay_measures_nothing_and_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(open_checkpoint(model), recipe(), tmp_path / "a", calibration())
    monkeypatch.setattr(sensitivity, "measure", lambda *_: pytest.fail("measured"))
    again = load_recipe(tmp_path / "a", tmp_path)
    assert again.methods()[0].options.budget.settled
    compress(open_checkpoint(model), again, tmp_path / "b", calibration())
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_the_same_command_again_finds_its_artifact(model: Path, tmp_path: Path) -> None:
    assert not compress(open_checkpoint(model), recipe(), tmp_path / "a", calibration()).existed
    assert compress(open_checkpoint(model), recipe(), tmp_path / "a", Later(calibration)).existed


def test_losses_are_the_divergence_of_the_model_with_only_this_group_rounded(model: Path) -> None:
    tokens = calibration().tokens
    checkpoint = open_checkpoint(model)
    groups = sensitivity.groups_of(checkpoint.config, recipe().methods()[0].options)
    losses = sensitivity.measure(load_decoder(checkpoint), groups, tokens)
    truth = load_decoder(checkpoint)(tokens).double().log_softmax(-1)
    for group, row in zip(groups, losses, strict=True):
        direct = []
        for form in group.forms:
            other = load_decoder(checkpoint)
            parent = other if group.block is None else other.blocks[group.block]
            for role in group.roles:
                module = getattr(parent, role)
                module.weight.copy_(sensitivity.rounded(module.weight, form))  # a tied head with it
            logp = other(tokens).double().log_softmax(-1)
            direct.append(float((truth.exp() * (truth - logp)).sum(-1).mean()))
        if group.block is None:
            assert row == pytest.approx(direct, rel=1e-3)
        else:  # measured on one candidate; for the others it is only as good as the quadratic law
            assert min(abs(a / b - 1) for a, b in zip(row, direct, strict=True)) < 1e-3
            assert all(0.4 < a / b < 2.5 for a, b in zip(row, direct, strict=True))
        assert row == sorted(row, reverse=True)  # more bits lose less


def test_the_decoder_is_as_it_was_afterwards(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    decoder = load_decoder(checkpoint)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    groups = sensitivity.groups_of(checkpoint.config, recipe().methods()[0].options)
    sensitivity.measure(decoder, groups, calibration().tokens)
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())
    assert decoder.head.weight is decoder.embed.weight


def test_layers_that_share_an_input_share_a_grid(model: Path, tmp_path: Path) -> None:
    compress(open_checkpoint(model), recipe(bits=4.6), tmp_path / "a", calibration())
    layers = load_recipe(tmp_path / "a", tmp_path).methods()[0].options.layers
    for i in range(SHAPE["num_hidden_layers"]):
        attention, ffn = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        assert layers[f"{attention}.q_proj"] == layers[f"{attention}.k_proj"] == layers[f"{attention}.v_proj"]
        assert layers[f"{ffn}.gate_proj"] == layers[f"{ffn}.up_proj"]


def test_a_plan_needs_no_measurement_and_keeps_to_the_budget(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    plan = make_plan(checkpoint.config, recipe(bits=5.0), checkpoint.dtype)
    assert 4.5 < plan.bits_per_weight <= 5.0
    weights = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names())
    assert plan.phases["measuring sensitivity"] > 4 * weights  # the whole model in float32


def test_a_budget_below_the_smallest_candidates_is_refused_before_the_calibration(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"a budget of 2 bits .* cannot be met: the smallest candidates make"):
        compress(open_checkpoint(model), recipe(bits=2.0), tmp_path / "a", Later(lambda: pytest.fail("made")))


@pytest.mark.parametrize("budget", [3.0, 4.1, 5.5, 7.5, 16.0])
def test_without_candidates_no_layer_gets_fewer_bits_than_all_could_have(model: Path, budget: float) -> None:
    checkpoint, embedding = open_checkpoint(model), {"bits": 2, "group_size": 32}

    def stored(bits: int) -> float:
        stage = {"method": "gptq", "bits": bits, "group_size": 32, "embedding": embedding}
        plain = parse_recipe({"version": 1, "name": "plain", "stages": [stage]}, "test")
        return make_plan(checkpoint.config, plain, checkpoint.dtype).bits_per_weight

    options = recipe(bits=budget, embedding=[embedding]).methods()[0].options
    groups = sensitivity._worthwhile(checkpoint.config, checkpoint.dtype, options)
    expected = [bits for bits in BUDGET_BITS if bits >= max(b for b in BUDGET_BITS if stored(b) <= budget)]
    for group in groups:
        assert [grid.bits for grid in group.candidates] == ([2] if group.block is None else expected)


def test_candidates_that_are_named_may_be_as_coarse_as_they_are(model: Path) -> None:
    options = recipe(bits=6.0, candidates=[{"bits": bits, "group_size": 32} for bits in (2, 8)]).methods()[0].options
    groups = sensitivity._worthwhile(open_checkpoint(model).config, torch.bfloat16, options)
    assert {len(group.forms) for group in groups} == {2}


def test_a_candidate_whose_groups_do_not_divide_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match=r"layers\.0\.self_attn\.q_proj: group_size 48"):
        compress(
            open_checkpoint(model), recipe(candidates=[{"bits": 4, "group_size": 48}]), tmp_path / "a", calibration()
        )


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"budget": 4.5, "layers": {"down": {"bits": 8}}}, "budget and layers"),
        (
            {"budget": {"bits": 4.5, "embedding": EMBEDDING}, "head": {"bits": 8}},
            "budget.embedding and embedding or head",
        ),
        ({"budget": 4.5, "format": "nf4"}, "budget needs candidates"),
        ({"budget": 40}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": {"bits": 4.5, "candidate": []}}, "did you mean 'candidates'"),
        ({"budgets": 4.5}, "did you mean 'budget'"),
    ],
)
def test_a_budget_that_contradicts_itself_is_refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"version": 1, "name": "r", "stages": [{"method": "gptq", **stage}]}, "test")
    assert message in str(caught.value)


def test_a_number_is_short_for_a_budget() -> None:
    parsed = parse_recipe({"version": 1, "name": "r", "stages": [{"method": "gptq", "budget": 4.5}]}, "test")
    budget = parsed.methods()[0].options.budget
    assert budget.bits == 4.5
    assert [grid.bits for grid in budget.grids(parsed.methods()[0].options)] == [2, 3, 4, 5, 6, 8]
    assert parsed.needs_calibration()
