"""Pruning without structure and by N:M: which weights go, what the others become, and what is stored of it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.grids import linear_shapes
from gossamer.compress.method import QuantizeOptions
from gossamer.compress.pipeline import compress
from gossamer.compress.plan import make_plan
from gossamer.compress.prune import owl
from gossamer.compress.prune.magnitude import Magnitude
from gossamer.compress.prune.masks import (
    OWLOptions,
    PruneOptions,
    Pruner,
    lowest_of_all,
    lowest_of_groups,
    lowest_of_rows,
)
from gossamer.compress.prune.owl import outlier_shares, spread
from gossamer.compress.prune.sparsegpt import SparseGPT, SparseGPTOptions
from gossamer.compress.prune.wanda import Wanda
from gossamer.compress.quantize.gptq import GPTQ, GPTQOptions
from gossamer.compress.recipe import Recipe, load_recipe, parse_recipe
from gossamer.compress.source import Source
from gossamer.errors import RecipeError, ShapeMismatch
from gossamer.formats import Codes, Dense, Integer, Sparse
from tiny_llama import make_folder

OPTIONS = {
    "magnitude": (Magnitude, PruneOptions),
    "wanda": (Wanda, PruneOptions),
    "sparsegpt": (SparseGPT, SparseGPTOptions),
}


def pruner(name: str, **options: Any) -> Pruner:
    method, kind = OPTIONS[name]
    return method(kind(**options))


def layer(out: int, columns: int, seed: int = 0, outliers: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs [tokens, in] (some of which are large), and their Hessian."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=g)
    x = torch.randn(4 * columns, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    if outliers:
        x[:, :: max(columns // 4, 1)] *= 20
        weight[:, :: max(columns // 4, 1)] *= 0.1
    return weight, x, x.T @ x


# Which weights go.


@given(out=st.integers(1, 20), columns=st.integers(1, 30), share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_just_the_share_that_was_asked_for_goes(out: int, columns: int, share: float, seed: int) -> None:
    scores = torch.randint(0, 4, (out, columns), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    count = round(share * out * columns)
    gone = lowest_of_all(scores, count)
    assert gone.sum() == count
    assert not count or count == scores.numel() or scores[gone].max() <= scores[~gone].min()
    by_row = lowest_of_rows(scores, share)
    assert by_row.sum() == count
    assert by_row.sum(1).max() - by_row.sum(1).min() <= 1
    for row, chosen in zip(scores, by_row, strict=True):
        assert not chosen.any() or chosen.all() or row[chosen].max() <= row[~chosen].min()


def test_a_pattern_keeps_the_heaviest_of_all_choices() -> None:
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    for n, m in ((2, 4), (4, 8)):
        gone = lowest_of_groups(scores, m - n, m)
        for group, chosen in zip(scores.view(-1, m), gone.view(-1, m), strict=True):
            best = max(combinations(range(m), n), key=lambda kept: float(group[list(kept)].sum()))
            assert sorted((~chosen).nonzero().flatten().tolist()) == sorted(best)


def test_magnitude_compares_a_layer_and_wanda_a_row_by_the_inputs() -> None:
    weight, x, hessian = layer(6, 8)
    every = sorted((abs(float(weight[r, c])), r, c) for r in range(6) for c in range(8))
    expected = weight.clone()
    for _, r, c in every[:24]:
        expected[r, c] = 0
    assert torch.equal(pruner("magnitude").prune(weight, 0.5, None), expected)
    expected = weight.clone()
    norms = [float(x[:, c].double().norm()) for c in range(8)]
    for r in range(6):
        for c in sorted(range(8), key=lambda c: abs(float(weight[r, c])) * norms[c])[:4]:
            expected[r, c] = 0
    assert torch.equal(pruner("wanda").prune(weight, 0.5, hessian), expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_method_keeps_to_pattern_and_share(name: str, pattern: str) -> None:
    weight, _, hessian = layer(20, 264)
    share = 0.5 if pattern != "unstructured" else 0.37
    found = pruner(name, pattern=pattern, sparsity=share).prune(weight, share, hessian)
    assert (found == 0).sum() == round(share * weight.numel())
    if pattern != "unstructured":
        n, m = (int(part) for part in pattern.split(":"))
        assert ((found.view(20, -1, m) != 0).sum(-1) == n).all()
    if name != "sparsegpt":
        assert torch.equal(found[found != 0], weight[found != 0])


# What the others become.


def obs(weight: Tensor, hessian: Tensor, damping: float, size: int, count: int) -> Tensor:
    """Optimal brain surgeon in float64, column by column: the rest of each row is the least-squares repair.

    Chooses `count` weights of each run of `size` columns: of all rows (size = in), or of each row.
    """
    w, (out, columns) = weight.double(), weight.shape
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(columns).double()
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(columns)]  # with all columns before i settled
    for start in range(0, columns, size):
        cost = torch.stack([w[:, i] ** 2 / inverses[i][0, 0] for i in range(start, start + size)], 1)
        gone = torch.zeros(out, size, dtype=torch.bool)
        for part, chosen in [(cost, gone)] if size == columns else list(zip(cost, gone, strict=True)):
            chosen.view(-1)[part.flatten().argsort()[:count]] = True
        for i in range(start, start + size):
            for r in range(out):
                if gone[r, i - start]:
                    w[r, i:] -= w[r, i].clone() / inverses[i][0, 0] * inverses[i][0]
                    w[r, i] = 0
    return w


@pytest.mark.parametrize(("pattern", "size", "count"), [("unstructured", 24, 72), ("2:4", 4, 2), ("4:8", 8, 4)])
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(pattern: str, size: int, count: int) -> None:
    weight, _, hessian = layer(6, 24, 3, outliers=False)
    found = pruner("sparsegpt", pattern=pattern).prune(weight, 0.5, hessian)
    expected = obs(weight, hessian, 0.01, size, count)
    assert torch.equal(found == 0, expected == 0)
    assert (found.double() - expected).abs().max() < 1e-4 * expected.abs().max()  # float32 factors of a Hessian


def test_repairs_reach_past_a_block_of_columns() -> None:
    weight, x, hessian = layer(4, 300, 5)
    found = pruner("sparsegpt").prune(weight, 0.5, hessian)
    kept = found != 0
    left = weight.masked_fill(~kept, 0.0)
    assert not torch.equal(found[:, 128:], left[:, 128:])
    assert ((found - weight) @ x.T).square().sum() < 0.7 * ((left - weight) @ x.T).square().sum()


def test_methods_that_know_the_inputs_lose_less() -> None:
    weight, x, hessian = layer(64, 128, 7)
    lost = {}
    for name in OPTIONS:
        error = pruner(name).prune(weight, 0.5, hessian) - weight
        lost[name] = float((x @ error.T).square().sum() / (x @ weight.T).square().sum())
    assert lost["sparsegpt"] < 0.8 * lost["wanda"]
    assert lost["wanda"] < 0.5 * lost["magnitude"]


def test_columns_that_no_input_uses_go_first() -> None:
    weight, _, hessian = layer(8, 32)
    hessian[:16], hessian[:, :16] = 0, 0
    for name in ("wanda", "sparsegpt"):
        found = pruner(name).prune(weight, 0.5, hessian)
        assert (found[:, :16] == 0).all(), name
        assert torch.allclose(found[:, 16:], weight[:, 16:]), name


# Codes after it.


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_takes_what_is_pruned_for_zeros_and_makes_up_for_it(act_order: bool, symmetric: bool) -> None:
    weight, x, hessian = layer(48, 128, 2)
    pruned = pruner("sparsegpt").prune(weight, 0.5, hessian)
    inner = Integer(3, 32, symmetric)
    gptq = GPTQ(GPTQOptions(bits=3, group_size=32, symmetric=symmetric, act_order=act_order))
    codes = gptq.quantize(pruned, Sparse(inner, 0.5), hessian)
    assert (codes.dequantize()[pruned == 0] == 0).all()
    after = gptq.quantize(pruned, inner, hessian).with_zeros(pruned == 0)  # as if the zeros came as a surprise

    def lost(found: Codes) -> float:
        return float((x @ (found.dequantize() - pruned).T).square().sum())

    assert lost(codes) < 0.97 * lost(after)


# Recipes.

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", **SHAPE)


def recipe(*stages: dict[str, Any]) -> Recipe:
    return parse_recipe({"version": 1, "name": "r", "stages": list(stages)}, "test")


def calibration() -> Calibration:
    tokens = torch.randint(0, 300, (4, 48), generator=torch.Generator().manual_seed(0))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 4, "length": 48, "seed": 0}
    return Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})


@pytest.mark.parametrize("name", list(OPTIONS))
def test_an_artifact_has_the_share_and_the_bits_that_its_plan_says(model: Path, tmp_path: Path, name: str) -> None:
    source = open_checkpoint(str(model))
    chosen = recipe({"method": name, "sparsity": 0.3, "layers": {"down": 0.7, "*.1.self_attn.o_proj": 0}})
    result = compress(source, chosen, tmp_path / "out", calibration())
    found = open_checkpoint(str(tmp_path / "out"))
    for i in range(2):
        for module, share in (("mlp.up_proj", 0.3), ("mlp.down_proj", 0.7), ("self_attn.o_proj", 0.0 if i else 0.3)):
            weight = found.tensor(f"model.layers.{i}.{module}.weight")
            assert (weight == 0).sum() == round(share * weight.numel())
    whole = "model.layers.1.self_attn.o_proj.weight"
    assert found.format(whole) == Dense(torch.float32)
    assert torch.equal(found.tensor(whole), source.tensor(whole))
    assert found.format("model.layers.0.mlp.down_proj.weight") == Sparse(Dense(torch.float32), 0.7)
    assert found.weight_bytes() == make_plan(source.config, chosen, source.dtype).output_bytes
    note = next(note for note in result.layers if note["block"] == 0 and note["linear"] == "down")
    assert note["bits_per_weight"] == pytest.approx(1 + 0.3 * 32 + 128 / (64 * 96), rel=1e-3)
    tokens = torch.arange(2, 42).view(2, 20)
    oracle, packed = load_decoder(found)(tokens), load_decoder(found, packed=True)(tokens)
    assert (packed - oracle).abs().max() < 1e-4 * oracle.std()


QUANTIZERS: list[dict[str, Any]] = [
    {"method": "gptq", "bits": 8, "group_size": "channel"},
    {"method": "gptq", "bits": 4, "group_size": 32, "symmetric": False},
    {"method": "rtn", "bits": 2, "group_size": 32},
    {"method": "hqq", "bits": 4, "group_size": 32, "symmetric": False},
    {"method": "awq", "bits": 4, "group_size": 32},
    {"method": "signround", "bits": 3, "group_size": 32, "symmetric": False, "steps": 4},
]


@pytest.mark.parametrize("stage", QUANTIZERS, ids=lambda s: f"{s['method']}{s['bits']}")
def test_a_quantizer_keeps_every_zero_and_stores_none(model: Path, tmp_path: Path, stage: dict[str, Any]) -> None:
    source = open_checkpoint(str(model))
    prune = {"method": "sparsegpt", "pattern": "2:4"}
    compress(source, recipe(prune), tmp_path / "pruned", calibration())
    compress(source, recipe(prune, stage), tmp_path / "both", calibration())
    pruned, both = open_checkpoint(str(tmp_path / "pruned")), open_checkpoint(str(tmp_path / "both"))
    for name in source.names():
        form = pruned.format(name)
        if not isinstance(form, Sparse):
            continue
        zeros, found = pruned.tensor(name) == 0, both.tensor(name)
        assert (found[zeros] == 0).all()
        assert both.format(name) == Sparse(QuantizeOptions(**_grid(stage)).format_for([32]), 0.5)
        stored = both.stored(name)
        nonzeros = int((found != 0).sum())
        assert len(stored["weight_packed"]) == -(-nonzeros * stage["bits"] // 32)
        assert both.nbytes(name) == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize(
    "tuner",
    [{"method": "qat", "zero_rate": 0.1}, {"method": "scales", "learning_rate": 0.1}],
    ids=lambda t: t["method"],
)
def test_training_brings_no_zero_back(model: Path, tmp_path: Path, tuner: dict[str, Any]) -> None:
    source = open_checkpoint(str(model))
    stages = [{"method": "wanda"}, {"method": "rtn", "bits": 3, "group_size": 32, "symmetric": False}]
    compress(source, recipe(*stages), tmp_path / "before", calibration())
    compress(source, recipe(*stages, {**tuner, "steps": 8}), tmp_path / "after", calibration())
    before, after = open_checkpoint(str(tmp_path / "before")), open_checkpoint(str(tmp_path / "after"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.tensor(name), after.tensor(name))
    assert (after.tensor(name)[before.tensor(name) == 0] == 0).all()
    assert isinstance(after.format(name), Sparse)


def _grid(stage: dict[str, Any]) -> dict[str, Any]:
    return {key: stage[key] for key in ("bits", "group_size", "symmetric") if key in stage}


# Shares by outliers.


def test_blocks_with_more_outliers_keep_more(model: Path) -> None:
    source = open_checkpoint(str(model))
    options = OWLOptions(sparsity=0.6, spread=0.1)
    modules = list(linear_shapes(source.config))
    found = spread(source, modules, [0.01, 0.03], options)
    assert {found[m] for m in modules if ".0." in m} == {0.7}
    assert {found[m] for m in modules if ".1." in m} == {0.5}
    some = [m for m in modules if ".0." in m or "down" in m]  # block 1 weighs less: the mean is over weights
    found, sizes = spread(source, some, [0.01, 0.03], options), linear_shapes(source.config)
    weights = {m: sizes[m][0] * sizes[m][1] for m in some}
    assert sum(found[m] * weights[m] for m in some) / sum(weights.values()) == pytest.approx(0.6, abs=1e-4)
    assert set(spread(source, modules, [0.02, 0.02], options).values()) == {0.6}


def test_outliers_are_counted_on_the_inputs_that_layers_see(model: Path) -> None:
    source, tokens, times = Source(open_checkpoint(str(model))), calibration().tokens, 2.5
    found = outlier_shares(source, tokens, times, lambda *_: None)
    decoder, seen = load_decoder(source.checkpoint), dict[str, Tensor]()
    for i, block in enumerate(decoder.blocks):
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            getattr(block, role).register_forward_pre_hook(
                lambda _, args, name=f"{i} {role}": seen.__setitem__(name, args[0].double().flatten(0, -2))
            )
    decoder(tokens)
    for i, block in enumerate(decoder.blocks):
        outliers = weights = 0
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            scores = getattr(block, role).weight.double().abs() * seen[f"{i} {role}"].norm(dim=0)
            outliers += int((scores > times * scores.mean()).sum())
            weights += scores.numel()
        assert found[i] == pytest.approx(outliers / weights, abs=2 / weights)  # a score at the very bound may fall


def test_an_artifact_says_every_share_and_a_replay_measures_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(str(model))
    stage = {"method": "wanda", "sparsity": 0.6, "allocate": "owl", "outlier": 2.5, "layers": {"down": 0.4}}
    result = compress(source, recipe(stage), tmp_path / "out", calibration())
    assert {layer["linear"] for layer in result.layers} >= {"q", "down"}
    found = open_checkpoint(str(tmp_path / "out"))
    zeros = {m: float((found.tensor(f"{m}.weight") == 0).float().mean()) for m in linear_shapes(source.config)}
    assert all(share == pytest.approx(0.4, abs=1e-3) for m, share in zeros.items() if "down" in m)
    others = {m: share for m, share in zeros.items() if "down" not in m}
    assert 0.02 < max(others.values()) - min(others.values()) <= 0.161
    assert sum(others.values()) / len(others) == pytest.approx(0.6, abs=2e-3)
    monkeypatch.setattr(owl, "outlier_shares", None)  # to call it would be an error
    again = load_recipe(tmp_path / "out", tmp_path)
    compress(source, again, tmp_path / "again", calibration())
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"method": "wanda", "sparsity": 1.0}], "sparsity"),
        ([{"method": "wanda", "sparsity": 0}], "sparsity"),
        ([{"method": "wanda", "pattern": "2:4", "sparsity": 0.6}], "2:4 has sparsity 0.5"),
        ([{"method": "wanda", "pattern": "4:8", "layers": {"down": 0.25}}], "4:8 has sparsity 0.5"),
        ([{"method": "wanda", "pattern": "1:4"}], "pattern"),
        ([{"method": "wanda", "layers": {"down": 1.5}}], "layers"),
        ([{"method": "wanda"}, {"method": "magnitude"}], "other forms"),
        ([{"method": "wanda", "pattern": "2:4", "allocate": "owl"}], "one sparsity"),
        ([{"method": "magnitude", "allocate": "owl"}], "allocate"),
        ([{"method": "depth"}, {"method": "wanda", "allocate": "owl"}], "counts outliers of the model"),
        ([{"method": "gptq"}, {"method": "wanda"}], "quantized them before"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(*stages)


def test_what_a_model_cannot_be_is_refused_before_any_work(model: Path) -> None:
    config = open_checkpoint(str(model)).config
    with pytest.raises(RecipeError, match="neither a role nor a pattern"):
        make_plan(config, recipe({"method": "wanda", "layers": {"dwon": 0.5}}), torch.float32)
    with pytest.raises(ShapeMismatch, match="floats or integers"):
        make_plan(config, recipe({"method": "wanda"}, {"method": "rtn", "format": "nf4"}), torch.float32)
    with pytest.raises(ShapeMismatch, match="floats or integers"):
        make_plan(config, recipe({"method": "wanda"}, {"method": "llm-int8"}), torch.float32)
