"""Tuners over a whole tiny model: nearer to the original, what stays and what may change, kills, divergence."""

from __future__ import annotations

import json
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
from gossamer.compress.blockwise import batches_of
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import parse_recipe
from gossamer.compress.tune import TuneOptions, kl_divergence
from gossamer.compress.tune.qat import QAT
from gossamer.compress.tune.qlora import QLoRAOptions
from gossamer.compress.tuning import TunedModel
from gossamer.errors import RecipeError
from gossamer.model.decoder import Decoder
from tiny_llama import make_folder

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
RTN = {"method": "rtn", "bits": 3, "group_size": 32}
SCALES, QAT_STAGE = {"method": "scales", "learning_rate": 5e-3}, {"method": "qat", "learning_rate": 0.01}
QLORA = {"method": "qlora", "rank": 16, "learning_rate": 5e-4}
METHODS = [pytest.param(stage, id=stage["method"]) for stage in (SCALES, QAT_STAGE, QLORA)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tune") / "model", **SHAPE)


def tokens(sequences: int = 130) -> Tensor:
    return torch.randint(0, 300, (sequences, 24), generator=torch.Generator().manual_seed(0))


def run(model: Path, out: Path, *tuners: dict[str, Any], base: dict[str, Any] = RTN, sequences: int = 130) -> Path:
    stages = [base, *({"steps": 40, "batch_size": 16, "positions": None, **tuner} for tuner in tuners)]
    recipe = parse_recipe({"version": 1, "name": "r", "stages": stages}, "test")
    record = {"kind": "self", "sha256": token_hash(tokens(sequences)), "sequences": sequences, "length": 24, "seed": 0}
    calibration = Calibration(tokens(sequences), {**record, "line_hashes": [], "details": {"source": "self"}})
    compress(open_checkpoint(model), recipe, out, calibration)
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def divergence(model: Path, other: Path | Decoder) -> float:
    """Mean KL divergence over fresh tokens, in float64."""
    fresh = torch.randint(0, 300, (8, 24), generator=torch.Generator().manual_seed(9))
    decoder = load_decoder(open_checkpoint(other)) if isinstance(other, Path) else other
    p = load_decoder(open_checkpoint(model))(fresh).double().log_softmax(-1)
    q = decoder(fresh).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_kl_divergence_is_the_formula() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(3, 50)) * 4, generator.normal(size=(3, 50)) * 4
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    wanted = (p * np.log(p / q)).sum(-1)
    found = kl_divergence(torch.tensor(a).float(), torch.tensor(b).float())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    assert kl_divergence(torch.tensor(a), torch.tensor(a) + 7).abs().max() < 1e-12  # a constant changes nothing


@pytest.mark.parametrize(("tuner", "share"), [(SCALES, 0.95), (QAT_STAGE, 0.85), (QLORA, 0.96)])
def test_tuning_brings_the_model_nearer_to_the_original_on_text_that_it_has_not_seen(
    model: Path, tmp_path: Path, tuner: dict[str, Any], share: float
) -> None:
    before = divergence(model, run(model, tmp_path / "rtn"))
    assert divergence(model, run(model, tmp_path / "tuned", tuner)) < share * before


@pytest.mark.parametrize("tuner", [SCALES, QAT_STAGE, QLORA])
def test_products_in_bfloat16_teach_about_as_much(model: Path, tmp_path: Path, tuner: dict[str, Any]) -> None:
    before = divergence(model, run(model, tmp_path / "rtn"))
    exact, rough = (
        before - divergence(model, run(model, tmp_path / precision, tuner | {"precision": precision}))
        for precision in ("float32", "bfloat16")
    )
    assert rough > 0.8 * exact > 0
    assert files(tmp_path / "float32")["model.safetensors"] != files(tmp_path / "bfloat16")["model.safetensors"]


@pytest.mark.parametrize("base", [RTN | {"symmetric": False}, RTN | {"head": {"bits": 4, "group_size": 32}}])
@pytest.mark.parametrize("tuner", METHODS)
def test_tuners_take_zero_points_and_packed_embeddings(
    model: Path, tmp_path: Path, tuner: dict[str, Any], base: dict[str, Any]
) -> None:
    before = divergence(model, run(model, tmp_path / "rtn", base=base))
    assert divergence(model, run(model, tmp_path / "tuned", tuner, base=base)) < before


def test_scales_leave_every_code_alone(model: Path, tmp_path: Path) -> None:
    before, after = weights(run(model, tmp_path / "rtn")), weights(run(model, tmp_path / "tuned", {"method": "scales"}))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", "weight"}
    assert all("norm" in name for name in changed if name.endswith(".weight"))
    plain = weights(run(model, tmp_path / "plain", {"method": "scales", "norms": False}))
    assert all(name.endswith("weight_scale") for name in before if not torch.equal(before[name], plain[name]))


def test_qat_begins_at_the_codes_that_are_there(model: Path, tmp_path: Path) -> None:
    """With weights that cannot move, codes of GPTQ stay those of GPTQ, which are not the nearest."""
    base = {"method": "gptq", "bits": 3, "group_size": 32}
    still = {"method": "qat", "learning_rate": 0.0, "scale_rate": 0.0, "zero_rate": 0.0}
    before, after = (
        weights(run(model, tmp_path / "a", base=base)),
        weights(run(model, tmp_path / "b", still, base=base)),
    )
    packed = [name for name in before if name.endswith("weight_packed")]
    assert all(torch.equal(before[name], after[name]) for name in packed)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # norms did learn
    moving = weights(run(model, tmp_path / "c", QAT_STAGE, base=base))
    share = torch.cat([(before[name] != moving[name]).flatten().float() for name in packed]).mean()
    assert 0.01 < share < 0.99


@pytest.mark.parametrize("tuner", METHODS)
def test_a_training_that_diverges_changes_nothing(model: Path, tmp_path: Path, tuner: dict[str, Any]) -> None:
    wild = tuner | {"learning_rate": 1e6, "steps": 3}
    before, after = weights(run(model, tmp_path / "rtn")), weights(run(model, tmp_path / "tuned", wild))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tuner", METHODS)
def test_a_training_that_is_stopped_at_any_save_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuner: dict[str, Any]
) -> None:
    tuner = tuner | {"steps": 7, "save_every": 2, "positions": 10}
    whole = files(run(model, tmp_path / "whole", tuner))

    class Stopped(Exception):
        pass

    save, stops = TunedModel.save, 0

    def save_and_stop(self: TunedModel, *arguments: Any, **named: Any) -> None:
        save(self, *arguments, **named)
        raise Stopped

    monkeypatch.setattr(TunedModel, "save", save_and_stop)
    while not (tmp_path / "out").exists():
        try:
            run(model, tmp_path / "out", tuner)
        except Stopped:
            stops += 1
        assert stops < 10
    assert stops == 3
    assert files(tmp_path / "out") == whole


def test_an_adapter_that_is_kept_lies_beside_codes_that_did_not_change(model: Path, tmp_path: Path) -> None:
    plain = run(model, tmp_path / "rtn")
    kept = run(model, tmp_path / "kept", {"method": "qlora", "keep": True, "rank": 8, "learning_rate": 1e-2})
    before, after = weights(plain), weights(kept)
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((kept / "adapter_config.json").read_text())
    adapter = load_file(kept / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 8
    decoder = load_decoder(open_checkpoint(kept))
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    for i, block in enumerate(decoder.blocks):
        for role, local in names.items():
            a, b = (adapter[f"base_model.model.model.layers.{i}.{local}.lora_{x}.weight"] for x in "AB")
            getattr(block, role).weight.add_(b @ a)
    assert len(adapter) == 2 * 2 * 7
    assert divergence(model, decoder) < 0.98 * divergence(model, plain)


def test_codebooks_learn_scales_but_have_no_weights_to_train_where_levels_are_a_rows_own(
    model: Path, tmp_path: Path
) -> None:
    base = {"method": "rtn", "format": "nf4", "group_size": 32}
    before = divergence(model, run(model, tmp_path / "nf4", base=base))
    assert divergence(model, run(model, tmp_path / "tuned", {"method": "scales"}, base=base)) < before
    assert divergence(model, run(model, tmp_path / "qat", {"method": "qat"}, base=base)) < before


def test_a_budget_of_time_ends_the_training(model: Path, tmp_path: Path) -> None:
    out = run(model, tmp_path / "out", {"method": "scales", "steps": 5_000, "seconds": 0.2})
    assert (out / "model.safetensors").exists()


def test_batches_give_every_sequence_before_any_comes_again() -> None:
    batches = batches_of(7, 2, 7, torch.Generator().manual_seed(0))
    order = torch.cat(list(batches))
    assert len(batches) == 7
    assert sorted(order[:7].tolist()) == sorted(order[7:].tolist()) == list(range(7))
    assert len(batches_of(3, 8, 5, torch.Generator())[4]) == 3  # no more than there are
    assert list(batches_of(3, 2, 0, torch.Generator())) == []


def test_a_tuner_before_there_are_codes_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        run(model, tmp_path / "out", RTN, base={"method": QAT.name})
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused() -> None:
    for bad in ({"steps": -1}, {"positions": 0}, {"learning_rates": 1.0}):
        with pytest.raises(ValidationError):
            TuneOptions(**bad)
    with pytest.raises(ValidationError):
        QLoRAOptions(rank=0)


def test_files_of_a_stopped_tuning_are_gone_in_the_end(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", {"method": "scales", "save_every": 1, "steps": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
