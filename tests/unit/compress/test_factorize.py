"""Low rank: the factors beside float64 formulas, the orders that methods must keep, and whole recipes of them.

A stored factor pair in float32 is off by float32 rounding alone: 1e-5 of the weight, or of the error that theory gives.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.cli.compress import recipes_folder
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.factorize import allocation
from gossamer.compress.factorize.allocation import candidates_of, measure_ranks, open_allocation
from gossamer.compress.factorize.quantized import quantize_factors
from gossamer.compress.factorize.rank import Factorizer, RankOptions
from gossamer.compress.method import QuantizeOptions, Quantizer
from gossamer.compress.pipeline import Result, compress
from gossamer.compress.plan import make_plan
from gossamer.compress.quantize.rtn import RTN
from gossamer.compress.recipe import Recipe, load_recipe, parse_recipe
from gossamer.compress.registry import method_class
from gossamer.compress.units import Units
from gossamer.errors import CompressionError, NumericalError, RecipeError, ShapeMismatch
from gossamer.formats import Codes, Dense, Integer, LowRank, TensorTrain
from tiny_llama import make_folder

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
SMALL = {"multiple": 8, "min_rank": 8}
METHODS = ("svd", "asvd", "svd-llm")


def method(name: str, **options: Any) -> Factorizer:
    cls = method_class(name)
    made = cls(cls.options_class().model_validate({**SMALL, **options}))
    assert isinstance(made, Factorizer)
    return made


def recipe(*stages: dict[str, Any]) -> Recipe:
    full = [{**SMALL, **s} if s["method"] in METHODS else s for s in stages]
    return parse_recipe({"version": 1, "name": "r", "stages": full}, "test")


def calibration() -> Calibration:
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 8, "length": 64, "seed": 0}
    return Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "model", **SHAPE)


def run(model: Path, wanted: Recipe, out: Path) -> Result:
    return compress(open_checkpoint(model), wanted, out, calibration())


def divergence(model: Path, folder: Path) -> float:
    """KL divergence on tokens that did not calibrate."""
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(1))
    wanted = load_decoder(open_checkpoint(model))(tokens).log_softmax(-1)
    found = load_decoder(open_checkpoint(folder))(tokens).log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def layer(out: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs [tokens, in] that are mixed of few directions of very different size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) * torch.logspace(1, -2, columns).unsqueeze(1)
    return torch.randn(out, columns, generator=g), torch.randn(tokens, columns, generator=g) @ mix


def factored(name: str, weight: Tensor, x: Tensor, rank: int, **options: Any) -> Tensor:
    form = LowRank(rank, Dense(torch.float32))
    return form.unpack(method(name, **options).store(weight, form, x.T @ x)).double()


# One layer.


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)], ids=str)
def test_at_full_rank_nothing_is_lost(name: str, shape: tuple[int, int]) -> None:
    weight, x = layer(*shape, tokens=200)
    assert (factored(name, weight, x, min(shape)) - weight).abs().max() < 1e-5 * weight.abs().max()


@pytest.mark.parametrize("tokens", [300, 30], ids=["full", "fewer tokens than inputs"])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_whitened_factors_have_the_least_output_error_there_is(tokens: int, rank: int) -> None:
    weight, x = layer(40, 64, tokens)
    outputs = x.double() @ weight.double().T  # whatever the factors, their outputs have this rank
    least = torch.linalg.svdvals(outputs)[rank:].square().sum()
    lost = (x.double() @ factored("svd-llm", weight, x, rank).T - outputs).square().sum()
    assert lost < least * (1 + 1e-3) + 1e-9 * outputs.square().sum()
    assert lost > least * (1 - 1e-3) - 1e-9 * outputs.square().sum()


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_plain_factors_are_the_nearest_to_the_weight(rank: int) -> None:
    weight, x = layer(40, 64, 300)
    least = torch.linalg.svdvals(weight.double())[rank:].square().sum()
    lost = (factored("svd", weight, x, rank) - weight).square().sum()
    assert float(lost) == pytest.approx(float(least), rel=1e-5)


def test_on_inputs_of_few_directions_whitened_factors_lose_far_less_than_scaled_and_these_than_plain_ones() -> None:
    weight, x = layer(40, 64, 300)
    x = x * torch.logspace(0, -1, 64)  # channels of different size, as activations have
    plain, scaled, whitened = ((x.double() @ (factored(n, weight, x, 8) - weight).T).square().sum() for n in METHODS)
    assert whitened < 0.2 * plain
    assert whitened < scaled < 0.9 * plain


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_scaled_factors_are_the_nearest_with_inputs_weighed(alpha: float) -> None:
    weight, x = layer(40, 64, 300)
    scale = x.double().square().mean(0).sqrt() ** alpha
    least = torch.linalg.svdvals(weight * scale)[8:].square().sum()
    lost = ((factored("asvd", weight, x, 8, alpha=alpha) - weight) * scale).square().sum()
    assert float(lost) == pytest.approx(float(least), rel=1e-3)


def test_a_layer_whose_inputs_are_all_zero_is_still_projected() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    for name in METHODS:
        assert torch.isfinite(factored(name, weight, torch.zeros(3, 64), 8)).all()


@pytest.mark.parametrize("name", ["asvd", "svd-llm"])
def test_inputs_that_are_no_numbers_are_refused(name: str) -> None:
    weight, x = layer(40, 64, 300)
    x[3, 5] = float("inf")
    with pytest.raises(NumericalError, match="not finite"):
        factored(name, weight, x, 8)


def test_codes_of_u_are_decided_by_what_comes_out_of_the_stored_v() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(RTN):
        def quantize(self, weight: Tensor, form: Any, hessian: Tensor | None, gradient: Tensor | None = None) -> Codes:
            assert hessian is not None
            seen.append((weight, hessian))
            return super().quantize(weight, form, hessian)

    g = torch.Generator().manual_seed(0)
    u, v, x = (torch.randn(size, generator=g) for size in ((40, 8), (8, 64), (300, 64)))
    form = LowRank(8, Integer(4, None))
    stored = quantize_factors(Watched(QuantizeOptions()), form, u, v, x.T @ x)
    inner = x @ form.factors(stored)[1].T
    assert torch.equal(seen[0][0], v)
    assert torch.equal(seen[1][0], u)
    assert torch.allclose(seen[1][1], inner.T @ inner, rtol=1e-4, atol=1e-2)


def test_gptq_loses_less_of_factors_than_rounding() -> None:
    weight, x = layer(40, 64, 300)
    form = LowRank(16, Dense(torch.float32))
    u, v = form.factors(method("svd-llm").store(weight, form, x.T @ x))
    errors = []
    for name in ("gptq", "rtn"):
        cls = method_class(name)
        quantizer = cls(cls.options_class().model_validate({"bits": 4, "group_size": 16}))
        assert isinstance(quantizer, Quantizer)
        coded = LowRank(16, Integer(4, 16))
        value = coded.unpack(quantize_factors(quantizer, coded, u, v, x.T @ x))
        errors.append(float((x @ (value - u @ v).T).square().sum()))
    assert errors[0] < 0.7 * errors[1]


# Which rank.


def test_ranks_follow_from_shares_in_multiples_and_no_smaller_than_the_least() -> None:
    half, sliver = RankOptions(ratio=0.5), RankOptions(ratio=0.01)
    assert half.of((576, 576), 32, 32) == 128  # 144 lies in the middle between two multiples: to the even one
    assert sliver.of((576, 576), 32, 64) == 64
    assert RankOptions(rank=33).of((576, 576), 32, 32) == 33
    assert RankOptions(ratio=1.0).of((576, 576), 32, 32) is None
    assert RankOptions(rank=288).of((576, 576), 32, 32) is None
    assert RankOptions(rank=287).of((576, 576), 32, 32) == 287


def test_layers_have_ranks_of_their_own_and_stay_whole_where_factors_do_not_pay(model: Path, tmp_path: Path) -> None:
    layers = {"down": {"rank": 12}, "*.layers.1.*": {"ratio": 1.0}, "k": {"rank": 60}}
    run(model, recipe({"method": "svd", "ratio": 0.5, "layers": layers}), tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")

    def name(i: int, module: str) -> str:
        return made.format(f"model.layers.{i}.{module}_proj.weight").name

    assert [name(i, "mlp.down") for i in range(3)] == ["rank12-fp32", "fp32", "rank12-fp32"]
    assert [name(i, "self_attn.q") for i in range(3)] == ["rank16-fp32", "fp32", "rank16-fp32"]
    assert [name(i, "self_attn.k") for i in range(3)] == ["fp32"] * 3
    whole = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(made.tensor(whole), open_checkpoint(model).tensor(whole))


def test_a_plan_says_how_large_the_output_is(model: Path, tmp_path: Path) -> None:
    for n, stages in enumerate(
        [[{"method": "svd"}], [{"method": "svd"}, {"method": "rtn", "group_size": 8}], [{"method": "tensor-train"}]]
    ):
        wanted = recipe(*stages)
        run(model, wanted, tmp_path / str(n))
        made = open_checkpoint(tmp_path / str(n))
        assert make_plan(open_checkpoint(model).config, wanted, torch.float32).output_bytes == made.weight_bytes()


def test_a_plan_counts_the_embedding_that_is_taken_apart_whole(model: Path) -> None:
    config = replace(open_checkpoint(model).config, vocab_size=1_000_000)
    one, less = (make_plan(config, recipe({"method": m}), torch.bfloat16).peak_bytes for m in ("tensor-train", "svd"))
    assert one - less > 12 * 1_000_000 * config.hidden_size


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"method": "svd", "ratio": 0}, "ratio"),
        ({"method": "svd", "ratio": 1.5}, "ratio"),
        ({"method": "svd", "rank": 0}, "rank"),
        ({"method": "svd", "rank": 8, "ratio": 0.5}, "ratio and rank"),
        ({"method": "svd", "rnak": 8}, "unknown key 'rnak'"),
        ({"method": "svd", "layers": {"down": {}}}, "says no ratio and no rank"),
        ({"method": "svd", "layers": {"down": {"ratio": 0.5, "bits": 3}}}, "bits"),
        ({"method": "svd", "allocate": "best"}, "allocate"),
        ({"method": "svd", "allocate": "kld", "rank": 8}, "allocate and layers or rank"),
        ({"method": "svd", "allocate": "kld", "layers": {"down": {"rank": 8}}}, "allocate and layers or rank"),
        ({"method": "asvd", "alpha": -1.0}, "alpha"),
        ({"method": "svd", "alpha": 0.5}, "unknown key 'alpha'"),
    ],
)
def test_options_that_make_no_sense_are_refused(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"version": 1, "name": "r", "stages": [stage]}, "test")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"method": "svd", "layers": {"dwon": {"rank": 8}}}], "neither a role nor a pattern"),
        ([{"method": "svd"}, {"method": "omniquant"}], "omniquant works on whole matrices"),
        ([{"method": "svd"}, {"method": "squeezellm"}], "factors keep no outliers"),
        (
            [{"method": "svd"}, {"method": "squeezellm", "outlier_share": 0.0, "sensitive_share": 0.0}],
            "works on whole matrices",
        ),
        ([{"method": "svd"}, {"method": "rtn"}, {"method": "scales"}], "scales trains codes of whole matrices"),
        ([{"method": "svd"}, {"method": "svd-llm"}], "whole matrices anew"),
        ([{"method": "gptq"}, {"method": "svd"}], "has quantized them before"),
        ([{"method": "tensor-train"}, {"method": "svd", "allocate": "kld"}], "whole matrices anew"),
    ],
)
def test_chains_that_would_not_work_are_refused_before_any_work(
    model: Path, tmp_path: Path, stages: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises((RecipeError, ShapeMismatch)) as caught:
        run(model, recipe(*stages), tmp_path / "out")
    assert words in caught.value.message
    assert not list(tmp_path.glob(".out*"))


# Whole models.


def test_whitened_factors_lose_less_of_a_model_than_plain_ones(model: Path, tmp_path: Path) -> None:
    lost = []
    for name in ("svd", "svd-llm"):
        run(model, recipe({"method": name, "ratio": 0.8}), tmp_path / name)
        lost.append(divergence(model, tmp_path / name))
    assert lost[1] < 0.95 * lost[0]


@pytest.mark.parametrize("name", ["svd", "svd-llm"])
def test_measured_ranks_lose_less_than_uniform_ones_of_no_fewer_parameters(
    model: Path, tmp_path: Path, name: str
) -> None:
    run(model, recipe({"method": name, "ratio": 0.75}), tmp_path / "uniform")
    run(model, recipe({"method": name, "ratio": 0.75, "allocate": "kld"}), tmp_path / "allocated")
    uniform, allocated = (open_checkpoint(tmp_path / n) for n in ("uniform", "allocated"))
    linears = [n for n in uniform.names() if n.endswith("_proj.weight")]
    weights = [sum(c.nbytes(n) for n in linears) / 4 for c in (uniform, allocated)]
    assert weights[1] <= 0.75 * sum(uniform.shape(n)[0] * uniform.shape(n)[1] for n in linears)
    assert weights[1] <= weights[0] * 1.02
    assert divergence(model, tmp_path / "allocated") < 0.8 * divergence(model, tmp_path / "uniform")


def test_a_rank_costs_what_was_measured_with_this_layer_alone(model: Path) -> None:
    """At the rank that was measured, the loss is the divergence of a model in which one layer is factorized."""
    checkpoint, tokens = open_checkpoint(model), calibration().tokens
    decider = method("svd-llm", ratio=0.75, allocate="kld")
    candidates = candidates_of(checkpoint.config, decider.options)
    losses = dict(zip(candidates, measure_ranks(checkpoint, decider, candidates, tokens, lambda *_: None), strict=True))
    module = "model.layers.1.mlp.down_proj"
    assert losses[module][-1] == 0
    assert sorted(losses[module], reverse=True) == losses[module]
    decoder = load_decoder(checkpoint)
    few = tokens[: allocation.SEQUENCES, : allocation.LENGTH]
    truth = decoder(few).log_softmax(-1)
    found = []
    x = decoder.embed(tokens)
    rotation = decoder.rotation(torch.arange(tokens.shape[1]).expand(tokens.shape))
    x = decoder.blocks[0](x, rotation)
    block: Any = decoder.blocks[1]
    middle = x + block.linear("o", block.mix(block.attn_norm(x), rotation))
    read = block.gated(block.ffn_norm(middle)).flatten(0, 1)
    weight = block.down.weight.detach().clone()
    for rank in candidates[module][:-1]:
        assert rank is not None
        form = LowRank(rank, Dense(torch.float32))
        with torch.no_grad():
            block.down.weight.copy_(form.unpack(decider.store(weight, form, read.T @ read)))
            logp = decoder(few).log_softmax(-1)
        found.append(float((truth.exp() * (truth - logp)).sum(-1).mean()))
    assert any(a == pytest.approx(b, rel=0.02) for a, b in zip(losses[module], found, strict=False))


def test_an_artifact_of_measured_ranks_is_replayed_without_measuring(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, recipe({"method": "svd-llm", "allocate": "kld"}), tmp_path / "out")
    recorded = load_recipe(tmp_path / "out", recipes_folder())
    assert open_allocation(recorded) is None
    assert len(recorded.stages[0]["layers"]) == 21
    monkeypatch.setattr(allocation, "measure_ranks", lambda *_: pytest.fail("measured again"))
    run(model, recorded, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_ratio_that_the_least_ranks_do_not_keep_says_what_they_take(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"ratio 0\.2 leaves \d+ parameters, ranks of 16 take \d+"):
        run(model, recipe({"method": "svd", "ratio": 0.2, "allocate": "kld", "min_rank": 16}), tmp_path / "out")


@pytest.mark.parametrize(
    "stages",
    [
        [{"method": "svd-llm", "ratio": 0.6}, {"method": "gptq", "bits": 8, "group_size": 32}],
        [{"method": "svd"}, {"method": "rtn", "bits": 4, "group_size": 8, "symmetric": False}],
        [{"method": "tensor-train"}, {"method": "gptq", "bits": 4, "group_size": 32}],
    ],
    ids=["svd-llm+gptq", "svd+rtn", "tensor-train+gptq"],
)
def test_stopped_after_every_unit_in_turn_it_resumes_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[dict[str, Any]]
) -> None:
    write, wanted = Units.write, recipe(*stages)
    result = run(model, wanted, tmp_path / "whole")
    assert all(0 < note["relative_error"] < 0.1 for note in result.layers)

    class Stopped(Exception):
        pass

    def write_and_stop(self: Units, *args: Any, **named: Any) -> None:
        write(self, *args, **named)
        raise Stopped

    monkeypatch.setattr(Units, "write", write_and_stop)
    stops = 0
    while not (tmp_path / "out").exists():
        try:
            run(model, wanted, tmp_path / "out")
        except Stopped:
            stops += 1
        assert stops < 40
    assert stops >= 6
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_quantized_factors_are_those_of_the_first_part_and_run_packed(model: Path, tmp_path: Path) -> None:
    first = {"method": "svd-llm", "ratio": 0.6}
    run(model, recipe(first), tmp_path / "floats")
    run(model, recipe(first, {"method": "gptq", "bits": 8, "group_size": "channel"}), tmp_path / "codes")
    floats, codes = (open_checkpoint(tmp_path / n) for n in ("floats", "codes"))
    name = "model.layers.1.mlp.gate_proj.weight"
    form = floats.format(name)
    assert isinstance(form, LowRank)
    assert codes.format(name) == LowRank(form.rank, Integer(8, None))
    tokens = calibration().tokens[:2]
    expected = load_decoder(codes)(tokens)
    assert (load_decoder(codes, packed=True)(tokens) - expected).abs().max() < 1e-4 * expected.std()
    assert divergence(tmp_path / "floats", tmp_path / "codes") < 0.01


def test_a_tensor_train_changes_the_embedding_alone(model: Path, tmp_path: Path) -> None:
    run(model, recipe({"method": "tensor-train", "ratio": 0.5}), tmp_path / "out")
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    embed = "model.embed_tokens.weight"
    assert after.format(embed) == TensorTrain((8, 8), (2,), torch.float32)
    assert after.nbytes(embed) == before.nbytes(embed) // 2
    assert all(torch.equal(after.tensor(n), before.tensor(n)) for n in before.names() if n != embed)
    unfolded = before.tensor(embed).double().view(-1, 8, 8)
    least = torch.linalg.svdvals(unfolded)[:, 2:].square().sum()
    lost = (after.tensor(embed) - before.tensor(embed)).double().square().sum()
    assert float(lost) == pytest.approx(float(least), rel=1e-5)


def test_the_shipped_recipes_say_what_their_names_do() -> None:
    for name in ("low-rank-svd-llm", "low-rank-int8"):
        shipped = load_recipe(name, recipes_folder())
        assert open_allocation(shipped) is not None
        json.dumps(shipped.canonical())
