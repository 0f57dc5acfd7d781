"""Rotation: the matrices are what they claim to be, and a rotated model is the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.base import Checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.quantize.rotate import Rotate, RotateOptions, Rotation, paley, sylvester
from gossamer.model.decoder import Decoder
from random_blocks import wide_norms
from tiny_llama import make_folder

SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 12}


def make_model(folder: Path, constant_norm: bool = False, **changes: Any) -> Checkpoint:
    """A tiny model whose norm weights differ from channel to channel, and whose biases are not zero."""
    make_folder(folder, **{**SHAPE, **changes})
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 + 0.2)
    if constant_norm:
        tensors["model.norm.weight"].fill_(1.75)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def logits(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """[batch, time, vocab], in this dtype throughout (see wide_norms)."""
    decoder: Decoder = load_decoder(checkpoint, dtype)
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    return decoder.head(decoder.final_norm(decoder.hidden(tokens)))


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 84])
def test_paleys_matrices_are_hadamard_matrices(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 6, 9, 52, 92])
def test_orders_without_a_construction_give_none(order: int) -> None:
    assert paley(order) is None


def test_sylvesters_matrix_is_the_power_of_the_smallest() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(sylvester(8), torch.kron(two, torch.kron(two, two)))


@pytest.mark.parametrize("size", [1, 2, 16, 64, 96, 128, 576, 960, 1536])
def test_a_rotation_is_orthogonal_with_entries_of_one_magnitude_where_a_hadamard_matrix_is_known(size: int) -> None:
    matrix = Rotation(size, seed=3).matrix()
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() < 1e-12
    assert (matrix.abs() * size**0.5 - 1).abs().max() < 1e-12


@pytest.mark.parametrize(("size", "kind"), [(9, "hadamard"), (30, "hadamard"), (48, "orthogonal"), (7, "orthogonal")])
def test_other_sizes_get_a_random_orthogonal_factor(size: int, kind: Any) -> None:
    matrix = Rotation(size, seed=3, kind=kind).matrix()
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() < 1e-12


@pytest.mark.parametrize("size", [12, 30, 576, 256])
def test_turning_by_factors_is_multiplying_by_their_kronecker_product(size: int) -> None:
    rotation = Rotation(size, seed=5)
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        product = torch.kron(product, factor)
    q = torch.diag(rotation.signs) @ product
    x = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (rotation.turn(x) - x @ q).abs().max() < 1e-12
    assert (rotation.turn_rows(x[0].T) - q.T @ x[0].T).abs().max() < 1e-12
    assert (rotation.turn_rows(x[0, 0]) - q.T @ x[0, 0]).abs().max() < 1e-12


def test_seeds_give_the_same_rotation_again_and_others_another() -> None:
    assert torch.equal(Rotation(64, 1).matrix(), Rotation(64, 1).matrix())
    assert not torch.equal(Rotation(64, 1).matrix(), Rotation(64, 2).matrix())


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "hidden_size": 30},  # no Hadamard matrix: a random factor of 15
    ],
)
def test_logits_are_the_same_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], values: bool, kind: Any
) -> None:
    wide_norms(monkeypatch)
    base = make_model(tmp_path / "model", **changes)
    rotated = Rotate(RotateOptions(values=values, kind=kind)).apply(base)
    expected, found = logits(base, torch.float64), logits(rotated, torch.float64)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_logits_in_float32_differ_by_rounding_alone(tmp_path: Path) -> None:
    base = make_model(tmp_path / "model")
    expected, found = logits(base, torch.float32), logits(Rotate(RotateOptions()).apply(base), torch.float32)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_head_stays_tied_only_behind_a_norm_of_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide_norms(monkeypatch)
    untied = Rotate(RotateOptions()).apply(make_model(tmp_path / "varied"))
    assert not untied.config.tie_embeddings
    assert untied.hf_config["tie_word_embeddings"] is False
    assert untied.shape("lm_head.weight") == (300, 48)
    assert untied.tensor("model.norm.weight").eq(1).all()
    base = make_model(tmp_path / "constant", constant_norm=True)
    tied = Rotate(RotateOptions()).apply(base)
    assert tied.config.tie_embeddings
    assert "lm_head.weight" not in tied.names()
    assert tied.tensor("model.norm.weight").eq(1.75).all()
    expected, found = logits(base, torch.float64), logits(tied, torch.float64)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_rows_are_the_rows_of_the_whole(tmp_path: Path) -> None:
    rotated = Rotate(RotateOptions()).apply(make_model(tmp_path / "model", attention_bias=True))
    for name in rotated.names():
        whole = rotated.tensor(name)
        assert tuple(whole.shape) == rotated.shape(name)
        assert torch.equal(rotated.tensor(name, slice(5, 11)), whole[5:11]), name
        assert torch.equal(rotated.stored(name)["weight"], whole.to(rotated.dtype))


def test_outliers_are_spread_over_all_channels(tmp_path: Path) -> None:
    base = make_model(tmp_path / "model")
    rotated = Rotate(RotateOptions()).apply(base)
    name = "model.layers.0.mlp.gate_proj.weight"
    scaled = base.tensor(name) * base.tensor("model.layers.0.post_attention_layernorm.weight")
    spread = [float(w.square().sum(0).max() / w.square().sum(0).mean()) for w in (scaled, rotated.tensor(name))]
    assert spread[1] < 0.7 * spread[0]


def test_the_fingerprint_tells_rotations_apart(tmp_path: Path) -> None:
    base = make_model(tmp_path / "model")
    prints = [Rotate(RotateOptions(seed=seed)).apply(base).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert base.fingerprint() not in prints


def test_unknown_options_are_refused() -> None:
    for bad in ({"kind": "random"}, {"seed": -1}, {"online": True}):
        with pytest.raises(ValidationError):
            RotateOptions.model_validate(bad)
