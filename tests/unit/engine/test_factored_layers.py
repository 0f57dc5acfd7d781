"""Layers of two factors in the C++ executor, beside a Decoder of their products, on every instruction set.

With exact activations logits differ by the order of float32 sums alone: 1e-4 of their spread. Rounding activations to 8
bits, twice in a factored layer, moves them by less than their spread.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_batches import RAGGED, check, random_steps
from factored import linears, write
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.engine.backend import Batch, blocks_for
from gossamer.engine.cpu import CpuBackend
from gossamer.engine.packing import expansion
from gossamer.formats import Codebook, Dense, Format, Integer, LowRank, TensorTrain

RANKS = (32, 5, 48, 16, 20, 64, 33)
"""Of layer after layer: whole blocks, whole tiles, and neither."""

WIDE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Their inputs are the residual stream, which groups of 32 divide in every layer."""


def ranks(source, inner: Format, only: tuple[str, ...] = ()) -> dict[str, Format]:
    """Factors for every linear layer, or those whose names end so; codes take ranks that their groups divide."""
    modules = [m for m in linears(source) if not only or m.endswith(only)]
    turns = RANKS if inner.group_size is None else (32, 64, 96)
    return {module: LowRank(turns[i % len(turns)], inner) for i, module in enumerate(modules)}


KINDS = {
    "bf16": lambda source: ranks(source, Dense(torch.bfloat16)),
    "fp32": lambda source: ranks(source, Dense(torch.float32)),
    "int8": lambda source: ranks(source, Integer(8, None)),
    "int4": lambda source: ranks(source, Integer(4, 32, symmetric=False), WIDE),
    "nf4": lambda source: ranks(source, Codebook("nf4", 32), WIDE),
    "some": lambda source: ranks(source, Integer(8, None), ("k_proj", "v_proj", "up_proj", "o_proj")),
    "ends": lambda source: {"model.embed_tokens": LowRank(24, Dense(torch.float32)), "lm_head": LowRank(8, Dense())},
    "train": lambda source: {"model.embed_tokens": TensorTrain((8, 8), (3,), torch.float32)},
}
CODED = ("int8", "int4", "nf4", "some")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, write_tiny_model, tmp_path_factory):
    changes = {"max_position_embeddings": 120, "num_hidden_layers": len(RAGGED), "gossamer_layers": RAGGED}
    if request.param == "bf16":
        changes |= {"attention_bias": True, "mlp_bias": True}
    if request.param == "ends":
        changes |= {"tie_word_embeddings": False}
    if request.param in ("ends", "train", "fp32"):
        changes |= {"dtype": "float32"}
    made = tmp_path_factory.mktemp("models")
    source = write_tiny_model(made / "source", **changes)
    write(source, made / request.param, KINDS[request.param](source))
    return made / request.param


@pytest.mark.parametrize("threads", [1, 3])
def test_random_steps_give_the_decoders_logits(isa, folder, threads) -> None:
    checkpoint = open_checkpoint(folder)
    backend = CpuBackend(checkpoint, activations="exact", kv_dtype="fp32", threads=threads)
    oracle = load_decoder(checkpoint)
    assert all(backend.expanded.values())
    for seed in range(2):
        check(backend, oracle, random_steps(backend.config, seed, steps=8), 1e-4)


def test_logits_have_the_same_bits_token_by_token_and_at_once(isa, folder) -> None:
    backend = CpuBackend(open_checkpoint(folder), threads=2)
    length = 40
    backend.reserve(blocks_for(length))
    table = np.arange(blocks_for(length), dtype=np.int32)[None]
    tokens = np.random.default_rng(0).integers(0, backend.config.vocab_size, length).astype(np.int32)

    def read(*chunks: int) -> torch.Tensor:
        rows, end = [], 0
        for count in chunks:
            end += count
            starts, wanted = np.array([0, count], np.int32), np.arange(count, dtype=np.int32)
            batch = Batch(tokens[end - count : end], starts, np.array([end], np.int32), table, wanted)
            rows.append(backend.forward(batch))
        return torch.cat(rows)

    whole = read(length)
    assert torch.equal(read(*[1] * length), whole)
    assert torch.equal(read(*[7] * 5, 5), whole)


def test_eight_bit_activations_move_logits_a_little(isa, folder) -> None:
    checkpoint = open_checkpoint(folder)
    if folder.name not in CODED:
        pytest.skip("these weights are no codes, and meet exact activations")
    rounded = CpuBackend(checkpoint, kv_dtype="fp32", threads=1)
    assert rounded.activations == "int8"
    oracle = load_decoder(checkpoint)
    moved = [
        float((rounded.forward(step.batch) - expected).abs().max() / expected.std())
        for step, expected in _expected(rounded, oracle)
    ]
    assert 1e-4 < max(moved) < 1.0


def _expected(backend, oracle):
    from engine_batches import NUM_BLOCKS, expected_logits

    backend.reserve(NUM_BLOCKS)
    for step in random_steps(backend.config, 0, steps=6):
        expected = expected_logits(oracle, step)
        if len(expected):
            yield step, expected
        else:
            backend.forward(step.batch)


def test_factors_take_the_memory_that_their_parameters_promise(write_tiny_model, tmp_path) -> None:
    changes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    source = write_tiny_model(tmp_path / "source", **changes)
    write(source, tmp_path / "half", {m: LowRank(32, Dense(torch.bfloat16)) for m in linears(source)})
    whole, half = (CpuBackend(open_checkpoint(f), threads=1).weight_bytes for f in (source, tmp_path / "half"))
    checkpoint = open_checkpoint(tmp_path / "half")
    assert expansion(checkpoint) == 0
    saved = open_checkpoint(source).weight_bytes() - checkpoint.weight_bytes()
    assert abs((whole - half) - saved) < 0.01 * saved


def test_factors_that_do_not_fit_are_refused_by_the_extension() -> None:
    from gossamer.kernels import cpu

    extension = cpu.extension()
    arena = extension.Arena()

    def dense(rows: int, columns: int, parts: int = 1, interleave: bool = False):
        made = [np.zeros((rows, columns), np.float32) for _ in range(parts)]
        return extension.pack_f32(arena, made, interleave, 1)

    pair = dense(64, 8)
    pair.after(dense(8, 32))
    square, turned = dense(8, 8), dense(16, 8, 2, True)
    for second, first in ((dense(64, 8), dense(9, 32)), (dense(32, 64), pair), (pair, dense(8, 32)), (square, square)):
        with pytest.raises(ValueError, match="factor"):
            second.after(first)
    with pytest.raises(ValueError, match="factor"):
        turned.after(dense(8, 32))
    x, y = np.zeros((1, 8), np.float32), np.zeros((1, 64), np.float32)
    with pytest.raises(ValueError, match="factors"):
        pair.linear(x, True, 1, y)
    with pytest.raises(ValueError, match="factors"):
        pair.take(np.zeros(1, np.int32), x)
