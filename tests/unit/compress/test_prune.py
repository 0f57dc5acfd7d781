"""Structured pruning: what is chosen, that what does nothing goes without a trace, and that the rest is a model."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import (
    CHANNEL,
    DEAD,
    GROUP,
    block_weights,
    calibration,
    decide,
    difference,
    inputs,
    logits,
    make_model,
    name,
    prune,
    recipe,
)
from safetensors.torch import load_file
from torch import Tensor

from engine_batches import check, random_steps
from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.pipeline import compress
from gossamer.compress.plan import make_plan
from gossamer.compress.prune.cut import CutCheckpoint
from gossamer.compress.prune.flap import FLAP
from gossamer.compress.prune.moments import Moments
from gossamer.compress.prune.structure import Piece, channel_pieces, head_pieces, keep_best, keep_evenly, share
from gossamer.compress.prune.wanda_sp import WandaSP
from gossamer.compress.source import Source
from gossamer.compress.units import Units
from gossamer.engine.backend import choose
from gossamer.errors import CompressionError, NumericalError, RecipeError, ShapeMismatch, UsageError
from gossamer.model import LayerConfig

WIDTH = 16
"""Of a head."""


# Pieces and budgets


def random_lists(seed: int) -> tuple[list[list[Piece]], int]:
    """Pieces of a few layers, and the most that one of channels costs."""
    rng, lists = random.Random(seed), []
    for i in range(rng.randint(1, 5)):
        layer = LayerConfig(8, rng.choice([1, 2, 4, 8]), WIDTH, rng.randint(33, 200))
        generator = torch.Generator().manual_seed(seed + i)
        heads = torch.rand(8, generator=generator)
        lists.append(head_pieces(i, layer, 64, heads, rng.choice(["group", "query", "keep"])))
        lists.append(channel_pieces(i, layer, 64, torch.rand(layer.ffn_width, generator=generator), 16))
    return lists, 3 * 64 * 16


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_met_within_half_a_step_over_all_layers(seed: int) -> None:
    lists, step = random_lists(seed)
    loose = sum(piece.cost for pieces in lists for piece in pieces[1:])
    for target in (loose // 10, loose // 3, loose // 2, loose):
        kept = keep_best(lists, target)
        gone = sum(piece.cost for pieces in lists for piece in pieces) - sum(piece.cost for piece in kept)
        assert abs(gone - target) <= step / 2
        for pieces in lists:  # what stays of a list is its best
            assert [piece in kept for piece in pieces] == sorted((piece in kept for piece in pieces), reverse=True)
            assert not pieces or pieces[0] in kept


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_met_within_half_a_step_in_each_layer(seed: int) -> None:
    lists, step = random_lists(seed)
    heads, channels = lists[:2]
    loose = sum(piece.cost for piece in (*heads[1:], *channels[1:]))
    for target in (loose // 20, loose // 5, loose // 2, loose):
        kept = keep_evenly(heads, channels, target)
        gone = sum(piece.cost for piece in (*heads, *channels)) - sum(piece.cost for piece in kept)
        assert abs(gone - target) <= step / 2
        assert kept[: len(kept)] == [
            *heads[: sum(p in kept for p in heads)],
            *channels[: sum(p in kept for p in channels)],
        ]


def test_heads_that_are_left_can_be_asked_to_divide_a_number() -> None:
    layer = LayerConfig(10, 5, WIDTH, 160)
    heads = head_pieces(0, layer, 160, torch.arange(10.0), "group")
    channels = channel_pieces(0, layer, 160, torch.arange(160.0), 8)
    target = share(layer, 160, 0.25)
    for divides, left in ((0, 8), (160, 8), (12, 6), (7, 10)):
        kept = keep_evenly(heads, channels, target, divides)
        assert sum(len(piece.members) for piece in kept if piece.part == "heads") == left
        gone = sum(p.cost for p in (*heads, *channels)) - sum(p.cost for p in kept)
        assert abs(gone - target) <= 3 * 160 * 8 / 2


def test_more_than_can_go_is_refused_with_both_numbers() -> None:
    lists, _ = random_lists(0)
    loose = sum(piece.cost for pieces in lists for piece in pieces[1:])
    with pytest.raises(CompressionError, match=f"{loose + 1} weights are to go, but only {loose} can") as caught:
        keep_best(lists, loose + 1)
    assert "smaller ratio" in (caught.value.hint or "")


def test_heads_go_with_all_that_share_their_keys_or_one_of_every_group() -> None:
    layer = LayerConfig(6, 2, WIDTH, 64)
    scores = torch.tensor([1.0, 5.0, 3.0, 2.0, 9.0, 1.0])
    groups = head_pieces(0, layer, 64, scores, "group")
    assert [piece.members for piece in groups] == [(3, 4, 5), (0, 1, 2)]
    assert [piece.score for piece in groups] == [4.0, 3.0]
    assert groups[0].cost == (3 + 3 + 1 + 1) * WIDTH * 64
    queries = head_pieces(0, layer, 64, scores, "query")
    assert [piece.members for piece in queries] == [(1, 4), (2, 3), (0, 5)]
    assert queries[0].cost == 2 * 2 * WIDTH * 64
    assert head_pieces(0, layer, 64, scores, "keep") == []


def test_channels_go_in_whole_steps() -> None:
    layer = LayerConfig(4, 2, WIDTH, 70)
    scores = torch.randperm(70, generator=torch.Generator().manual_seed(0)).float()
    pieces = channel_pieces(0, layer, 64, scores, 32)
    assert [len(piece.members) for piece in pieces] == [32, 32, 6]
    assert sorted(n for piece in pieces for n in piece.members) == list(range(70))
    assert all(min(scores[list(a.members)]) > max(scores[list(b.members)]) for a, b in pairwise(pieces))
    assert [piece.cost for piece in pieces] == [3 * 64 * 32, 3 * 64 * 32, 3 * 64 * 6]


# What is left is the same function where what went did nothing


UNLIKE = {0: ([1], range(32)), 1: ([], range(1, 96, 3)), 2: ([0, 2], [])}


def cut_of(dead: dict[int, Any]) -> dict[str, Tensor]:
    """The decision that takes just the dead parts."""
    made = {}
    for i, (groups, channels) in dead.items():
        made[f"{i}.heads"] = torch.tensor([h for h in range(6) if h // 2 not in groups], dtype=torch.int32)
        made[f"{i}.channels"] = torch.tensor([c for c in range(96) if c not in [*channels]], dtype=torch.int32)
    return made


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}])
def test_dead_heads_channels_and_layers_are_cut_without_a_trace(tmp_path: Path, changes: dict[str, Any]) -> None:
    layers = (1,) if not changes.get("mlp_bias") else ()
    base = open_checkpoint(make_model(tmp_path / "model", UNLIKE, layers, **changes))
    kept = torch.tensor([i for i in range(3) if i not in layers])
    cut = CutCheckpoint(base, {**cut_of(UNLIKE), "layers": kept})
    assert cut.config.num_layers == 3 - len(layers)
    assert cut.config.layers[-1].num_kv_heads == 1
    assert difference(logits(cut), logits(base)) < 1e-5


def test_rows_of_a_cut_model_are_the_rows_of_the_whole(tmp_path: Path) -> None:
    base = open_checkpoint(make_model(tmp_path / "model", attention_bias=True, mlp_bias=True))
    extra = {"0.down.bias": torch.arange(96.0)}
    cut = CutCheckpoint(base, {**cut_of(UNLIKE), **extra})
    for tensor in cut.names():
        whole = cut.tensor(tensor)
        assert tuple(whole.shape) == cut.shape(tensor)
        for rows in (slice(3, 9), slice(0, 1), slice(5, 5), slice(2, 10**6)):
            assert torch.equal(cut.tensor(tensor, rows), whole[rows]), tensor
        assert torch.equal(cut.stored(tensor)["weight"], whole.to(cut.dtype))
    assert torch.equal(cut.tensor(name("down", 0, "bias")), extra["0.down.bias"])
    assert cut.parameters() == sum(cut.tensor(tensor).numel() for tensor in cut.names())


def test_only_what_lies_between_the_kept_rows_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(make_model(tmp_path / "model"))
    read: list[tuple[str, int]] = []
    tensor = type(base).tensor

    def noted(self: Checkpoint, name: str, rows: slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        assert rows is not None
        read.append((name, rows.stop - rows.start))
        return tensor(self, name, rows, dtype)

    monkeypatch.setattr(type(base), "tensor", noted)
    cut = CutCheckpoint(base, cut_of(UNLIKE))
    assert read == []
    cut.tensor(name("up", 1), slice(0, 4))  # channels 0, 2, 3, 5
    assert read == [(name("up", 1), 6)]


def test_fingerprints_tell_cuts_apart(tmp_path: Path) -> None:
    base = open_checkpoint(make_model(tmp_path / "model"))
    prints = {CutCheckpoint(base, cut_of(dead)).fingerprint() for dead in (UNLIKE, {0: UNLIKE[0]}, {})}
    assert len(prints) == 3
    assert base.fingerprint() not in prints
    assert CutCheckpoint(base, cut_of(UNLIKE)).fingerprint() in prints


def test_groups_of_unlike_size_are_refused(tmp_path: Path) -> None:
    base = open_checkpoint(make_model(tmp_path / "model"))
    with pytest.raises(CompressionError, match=r"layer 1: .*\[2, 1, 2\] query heads"):
        CutCheckpoint(base, {"1.heads": torch.tensor([0, 1, 3, 4, 5])})


TOTAL = 3 * (3 * GROUP + 96 * CHANNEL)


def test_flap_takes_what_is_dead_first_and_nothing_changes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", DEAD)
    pruned = prune(model, tmp_path / "out", {"method": "flap", "ratio": (2 * GROUP + 96 * CHANNEL) / TOTAL})
    assert [(layer.num_heads, layer.num_kv_heads, layer.ffn_width) for layer in pruned.config.layers] == [
        (4, 2, 64), (6, 3, 64), (4, 2, 64),
    ]  # fmt: skip
    assert difference(logits(pruned), logits(open_checkpoint(model))) < 1e-5


@pytest.mark.parametrize("method", ["wanda-sp", "flap"])
def test_the_same_share_of_every_layer_is_a_plain_folder(tmp_path: Path, method: str) -> None:
    dead = {i: ([i], [*range(i, 96, 3)]) for i in range(3)}
    model = make_model(tmp_path / "model", dead)
    extra = {"uniform": True} if method == "flap" else {}
    pruned = prune(model, tmp_path / "out", {"method": method, "ratio": 1 / 3, **extra})
    assert {(layer.num_heads, layer.num_kv_heads, layer.ffn_width) for layer in pruned.config.layers} == {(4, 2, 64)}
    assert difference(logits(pruned), logits(open_checkpoint(model))) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "gossamer_layers" not in config


# What is measured


@pytest.mark.parametrize("parts", [[7], [1, 1, 5], [100, 3]])
def test_moments_are_mean_and_sample_variance_of_all_parts_at_once(parts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(parts), 5, generator=generator) * 3 + 1000
    moments = Moments(5)
    for part in x.split(parts):
        moments.add(part.unsqueeze(0))
    assert (moments.mean - x.double().mean(0)).abs().max() < 1e-10
    assert (moments.variance - x.double().var(0)).abs().max() < 1e-9
    assert (moments.squares - x.double().square().mean(0)).abs().max() < 1e-8


def test_activations_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        Moments(2).add(torch.tensor([[1.0, float("nan")]]))


def weight(model: Path, role: str, i: int) -> Tensor:
    return load_file(model / "model.safetensors")[name(role, i)].double()


def test_flaps_scores_are_standardized_variance_times_squared_norm(tmp_path: Path) -> None:
    """Channel by channel, so that the kept ones are just the best of the formula."""
    model, seen = make_model(tmp_path / "model"), {}
    for (i, role), x in inputs(open_checkpoint(model)).items():
        score = x.var(0) * weight(model, role, i).square().sum(0)
        seen[i, role] = (score - score.mean()) / score.std()
    made = decide(model, FLAP, ratio=0.2, heads="keep", multiple=1)
    scores = torch.cat([seen[i, "down"] for i in range(3)])
    gone = round(0.2 * TOTAL / CHANNEL)
    best = scores.argsort(descending=True)[: 288 - gone].sort().values
    found = torch.cat([made[f"{i}.channels"] + 96 * i for i in range(3)])
    assert torch.equal(found.long(), best)
    made = decide(model, FLAP, ratio=0.2, multiple=96)  # channels cannot go: whole groups of heads do
    scores = torch.cat([seen[i, "o"].view(3, 2 * WIDTH).mean(1) for i in range(3)])
    kept = {i * 3 + int(h) // 2 for i in range(3) for h in made[f"{i}.heads"]}
    worst = scores.argsort()[: 9 - len(kept)].tolist()
    assert kept == set(range(9)) - set(worst)
    assert len(kept) < 9


def test_flaps_biases_are_the_mean_of_what_went(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", attention_bias=True)
    made, biases = decide(model, FLAP, ratio=0.4), load_file(model / "model.safetensors")
    checked = 0
    for (i, role), x in inputs(open_checkpoint(model)).items():
        stays = torch.zeros(x.shape[1], dtype=torch.bool)
        if role == "o":
            stays.view(6, WIDTH)[made[f"{i}.heads"].long()] = True
        else:
            stays[made[f"{i}.channels"].long()] = True
        if stays.all():
            assert f"{i}.{role}.bias" not in made
            continue
        mean = (x[:, ~stays] @ weight(model, role, i)[:, ~stays].T).mean(0)
        if role == "o":
            mean += biases[name("o", i, "bias")]
        assert (made[f"{i}.{role}.bias"] - mean).abs().max() < 1e-5 * mean.abs().max()
        checked += 1
    assert checked >= 3
    assert not any(key.endswith("bias") for key in decide(model, FLAP, ratio=0.4, bias=False))


def test_wandas_scores_are_sums_of_magnitude_times_norm_on_the_pruned_stream(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    made = decide(model, WandaSP, ratio=0.25, multiple=1, heads="query")
    for i in range(3):
        done = {key: value for key, value in made.items() if int(key.split(".")[0]) < i}
        seen = inputs(CutCheckpoint(open_checkpoint(model), done))
        scores = {r: weight(model, r, i).abs().sum(0) * seen[i, r].norm(dim=0) for r in ("o", "down")}
        channels, heads = made[f"{i}.channels"].long(), made[f"{i}.heads"].long()
        assert torch.equal(channels, scores["down"].argsort(descending=True)[: len(channels)].sort().values)
        by_group = scores["o"].view(3, 2, WIDTH).sum(2)
        assert torch.equal(heads, by_group.argmax(1) + torch.arange(3) * 2)
        assert len(heads) == 3


# The result as a model


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("stage", [{"method": "flap"}, {"method": "flap", "heads": "query"}, {"method": "wanda-sp"}])
def test_the_ratio_is_met_within_one_step_a_layer(tmp_path: Path, stage: dict[str, Any], ratio: float) -> None:
    model = make_model(tmp_path / "model")
    pruned = prune(model, tmp_path / "out", {**stage, "ratio": ratio, "multiple": 8})
    total, step = block_weights(open_checkpoint(model)), 8 * CHANNEL
    gone = total - block_weights(pruned)
    assert abs(gone - ratio * total) <= step * (3 if stage["method"] == "wanda-sp" else 1)
    for layer in pruned.config.layers:
        assert layer.ffn_width % 8 == 0
        assert layer.group in ({1, 2} if stage.get("heads") == "query" else {2})


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_both_backends_run_a_ragged_model_alike_and_others_refuse_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig

    pruned = prune(
        make_model(tmp_path / "model", **changes), tmp_path / "out", {"method": "flap", "ratio": 0.4, "multiple": 16}
    )
    assert len(set(pruned.config.layers)) > 1
    assert all({"o", "down"} & layer.biases for layer in pruned.config.layers)
    oracle = load_decoder(pruned)
    for backend in ("reference", "cpu"):
        kv = "fp32" if backend == "cpu" else "auto"
        running = choose(pruned, backend, activations="exact", kv_cache=kv)
        check(running, oracle, random_steps(running.config, 0, steps=4), 1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gossamer_llama"
    assert config["architectures"] == ["GossamerLlamaForCausalLM"]
    with pytest.raises(ValueError, match="gossamer_llama"):
        AutoConfig.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "wanda-sp", "ratio": 0.3},
        {"method": "wanda-sp", "ratio": 0.3, "heads": "query"},
        {"method": "flap", "ratio": 0.3, "uniform": True},
        {"method": "depth", "ratio": 0.34},
    ],
    ids=["wanda-sp", "wanda-sp-query", "flap-uniform", "depth"],
)
def test_a_uniform_model_loads_in_transformers(tmp_path: Path, stage: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    pruned = prune(make_model(tmp_path / "model"), tmp_path / "out", stage)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    text = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert difference(model(text).logits, logits(pruned)) < 1e-4
    assert block_weights(pruned) < 0.75 * block_weights(open_checkpoint(tmp_path / "model"))


def test_a_pruned_model_is_pruned_again(tmp_path: Path) -> None:
    stages = ({"method": "flap", "ratio": 0.2}, {"method": "depth", "ratio": 0.34}, {"method": "flap", "ratio": 0.2})
    model = make_model(tmp_path / "model")
    pruned = prune(model, tmp_path / "out", *stages)
    assert pruned.config.num_layers == 2
    assert 0.3 < block_weights(pruned) / block_weights(open_checkpoint(model)) < 0.55
    assert logits(pruned).isfinite().all()


def test_pruned_layers_quantize_and_a_kill_anywhere_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    stages = ({"method": "flap", "ratio": 0.3}, {"method": "gptq", "bits": 8, "group_size": 32})
    whole, write = prune(model, tmp_path / "whole", *stages), Units.write
    assert whole.format(name("down", 0)).name == "int8-g32"
    assert whole.config.layers[0].biases >= {"down"}
    plain = prune(model, tmp_path / "plain", stages[0])
    assert 0 < (logits(whole) - logits(plain)).std() < 0.2 * logits(plain).std()

    class Stopped(Exception):
        pass

    def write_and_stop(self: Units, *args: Any, **named: Any) -> None:
        write(self, *args, **named)
        raise Stopped

    monkeypatch.setattr(Units, "write", write_and_stop)
    stops = 0
    while not (tmp_path / "out").exists():
        try:
            prune(model, tmp_path / "out", *stages)
        except Stopped:
            stops += 1
        assert stops < 10
    assert stops == 4  # the decision and three blocks
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


# What is refused


@pytest.mark.parametrize(
    ("stages", "error", "reason"),
    [
        (({"method": "rtn"}, {"method": "flap"}), RecipeError, r"stage 2 \(flap\) changes float weights, but stage 1"),
        (({"method": "flap", "ratoi": 0.1},), RecipeError, "unknown key 'ratoi'"),
        (({"method": "flap", "ratio": 1.0},), RecipeError, "ratio"),
        (({"method": "flap", "heads": "kv"},), RecipeError, "heads"),
        (({"method": "flap", "ratio": 0.95},), CompressionError, "weights are to go, but only"),
        (({"method": "wanda-sp", "ratio": 0.95},), CompressionError, "weights are to go, but only"),
        (({"method": "flap"}, {"method": "rtn", "group_size": 48}), ShapeMismatch, "48"),
        (({"method": "depth", "ratio": 0.1},), CompressionError, "a ratio of 0.1 of 3 layers means 0 of them"),
        (({"method": "depth", "ratio": 0.9},), CompressionError, "means 3 of them"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    tmp_path: Path, stages: tuple[dict[str, Any], ...], error: type[Exception], reason: str
) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(error, match=reason):
        prune(model, tmp_path / "out", *stages)
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [model]


def test_ragged_layers_cannot_become_uniform(tmp_path: Path) -> None:
    stages = ({"method": "flap", "ratio": 0.3}, {"method": "flap", "ratio": 0.2, "uniform": True})
    with pytest.raises(CompressionError, match="needs a model whose layers are alike"):
        prune(make_model(tmp_path / "model"), tmp_path / "out", *stages)


def test_pruning_asks_for_tokens(tmp_path: Path) -> None:
    model = open_checkpoint(make_model(tmp_path / "model"))
    for method in ("flap", "wanda-sp", "depth"):
        with pytest.raises(UsageError, match=f"{method} needs calibration tokens"):
            compress(model, recipe({"method": method}), tmp_path / "out")


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "llm-pruner", "depth"])
def test_scores_come_from_as_many_sequences_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen, embed = list[Tensor](), Source.embed
    monkeypatch.setattr(Source, "embed", lambda self, tokens: seen.append(tokens) or embed(self, tokens))
    model = make_model(tmp_path / "m")
    prune(model, tmp_path / "all", {"method": method, "ratio": 0.3})
    prune(model, tmp_path / "few", {"method": method, "ratio": 0.3, "sequences": 2})
    assert [len(tokens) for tokens in seen] == [4, 2]
    assert torch.equal(seen[1], seen[0][:2])


def test_the_plan_says_how_small_the_model_gets(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for stage in ({"method": "flap", "ratio": 0.3, "multiple": 8}, {"method": "depth", "ratio": 0.34}):
        plan = make_plan(open_checkpoint(model).config, recipe(stage), torch.float32)
        pruned = prune(model, tmp_path / stage["method"], stage)
        assert plan.output_bytes == pytest.approx(pruned.weight_bytes(), rel=0.03)
        assert stage["method"] in plan.phases
        assert plan.peak_bytes > plan.output_bytes


@pytest.mark.parametrize("method", ["flap", "llm-pruner", "depth"])
def test_the_plan_counts_the_text_that_is_read(tmp_path: Path, method: str) -> None:
    config = open_checkpoint(make_model(tmp_path / "model")).config
    stages = [{"method": method, "ratio": 0.34, "sequences": count} for count in (None, 2)]
    everything, few = (make_plan(config, recipe(stage), torch.float32).phases for stage in stages)
    assert few[method] < everything[method]


def test_recorded_calibration_is_the_tokens(tmp_path: Path) -> None:
    prune(make_model(tmp_path / "model"), tmp_path / "out", {"method": "flap"})
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert manifest["calibration"]["sha256"] == calibration().record["sha256"]
    assert manifest["recipe"]["stages"][0]["heads"] == "group"
