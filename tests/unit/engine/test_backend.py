"""Every backend computes what the Decoder does without a cache; batches that make no sense are named; the choice."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from engine_batches import RAGGED, check, random_steps
from gossamer.checkpoint import memory, open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.engine import LLM
from gossamer.engine.backend import BLOCK_SIZE, Backend, Batch, cache_bytes, choose, kv_bytes_per_token, resolve
from gossamer.engine.reference import ReferenceBackend
from gossamer.errors import DoesNotFit, EngineError, UnknownName

BACKENDS = [
    pytest.param(("reference", "auto", 1e-4), id="reference"),
    pytest.param(("cpu", "fp32", 1e-4), id="cpu"),
    pytest.param(("cpu", "bf16", 0.2), id="cpu-bf16"),
    pytest.param(("cpu", "int8", 0.5), id="cpu-int8"),
]
"""Name, dtype of the KV cache, and the largest error of any logit, over the spread of logits. The weights are random
and large, so attention is sharp: what a rounded cache does here it does not do to a trained model."""


@pytest.fixture(scope="module", params=["dense", "packed", "biases"])
def ragged(request, write_tiny_model, tmp_path_factory):
    """A folder of a model whose layers differ, with a context of 160 tokens."""
    changes = {"num_hidden_layers": len(RAGGED), "gossamer_layers": RAGGED, "max_position_embeddings": 160}
    if request.param == "biases":
        changes |= {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    folder = tmp_path_factory.mktemp("ragged") / request.param
    return write_tiny_model(folder, packed=request.param == "packed", **changes)


@pytest.fixture(scope="module")
def oracle(ragged):
    return load_decoder(open_checkpoint(ragged))


@pytest.fixture(scope="module", params=BACKENDS)
def case(request, ragged) -> tuple[Backend, str, float]:
    """A backend with exact activations, how its cache was asked for, and its tolerance."""
    name, kv_cache, tolerance = request.param
    return choose(open_checkpoint(ragged), name, activations="exact", kv_cache=kv_cache), kv_cache, tolerance


@pytest.fixture
def tiny(tiny_model) -> ReferenceBackend:
    found = ReferenceBackend.load(open_checkpoint(tiny_model))
    found.reserve(8)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_steps_give_what_the_decoder_does_without_a_cache(case, oracle, seed):
    backend, _, tolerance = case
    check(backend, oracle, random_steps(backend.config, seed), tolerance)


def test_the_random_steps_are_of_every_kind(ragged):
    steps = [s.batch for seed in range(4) for s in random_steps(open_checkpoint(ragged).config, seed)]
    kinds = [{1: "decode"}.get(n, "chunk") for b in steps for n in b.query_lens]
    assert min(kinds.count("decode"), kinds.count("chunk")) > 20
    assert any({"decode", "chunk"} <= {"decode" if n == 1 else "chunk" for n in b.query_lens} for b in steps)
    assert any(len(b.logit_rows) == 0 for b in steps)
    assert any(b.context_lens.max() > 5 * BLOCK_SIZE for b in steps)
    assert any((np.diff(table[: n // BLOCK_SIZE]) < 0).any() for b in steps
               for table, n in zip(b.block_tables, b.context_lens, strict=True))  # fmt: skip


def test_what_others_left_in_a_block_is_never_seen(tiny):
    batch = one(list(range(3, 20)), table=[5, 2])
    clean = tiny.forward(batch)
    for pool in (*tiny.keys, *tiny.values):
        pool.fill_(torch.nan)
    assert torch.equal(tiny.forward(batch), clean)
    two = Batch(
        np.array([7, 8], np.int32), np.array([0, 1, 2], np.int32), np.array([18, 1], np.int32),
        np.array([[5, 2], [0, 0]], np.int32), np.array([0, 1], np.int32),
    )  # fmt: skip
    assert tiny.forward(two).isfinite().all()


def test_a_decode_does_not_feel_its_neighbours(tiny):
    prompts = [list(range(3, 20)), [9, 8, 7]]
    tables = [[5, 2], [6]]
    for prompt, table in zip(prompts, tables, strict=True):
        tiny.forward(one(prompt, table))
    alone = [tiny.forward(one([40], table, context=len(p) + 1)) for p, table in zip(prompts, tables, strict=True)]
    together = Batch(
        np.array([40, 40], np.int32), np.array([0, 1, 2], np.int32), np.array([18, 4], np.int32),
        np.array([[5, 2], [6, -1]], np.int32), np.array([0, 1], np.int32),
    )  # fmt: skip
    assert (tiny.forward(together) - torch.cat(alone)).abs().max() < 1e-4


def test_a_reserve_keeps_what_is_enough_and_gives_all_back(tiny):
    tiny.reserve(5)
    assert tiny.num_blocks == 8
    assert [tuple(k.shape) for k in tiny.keys] == [(8, BLOCK_SIZE, 2, 16)] * 2
    tiny.reserve(0)
    assert (tiny.num_blocks, tiny.keys) == (0, [])


def test_a_reserve_that_does_not_fit_leaves_all_as_it_was(tiny, monkeypatch):
    more = 12 * BLOCK_SIZE * 4 * tiny.config.kv_elements_per_token()
    monkeypatch.setattr(memory, "available_memory", lambda: more - 1)
    with pytest.raises(DoesNotFit, match=rf"growing the KV cache to 320 tokens takes {more / 1e6:.1f} MB"):
        tiny.reserve(20)
    assert tiny.num_blocks == len(tiny.keys[0]) == 8
    monkeypatch.setattr(memory, "available_memory", lambda: more)
    tiny.reserve(20)
    assert tiny.num_blocks == 20


def test_weights_are_counted_once(tiny, tiny_model):
    assert tiny.weight_bytes == pytest.approx(open_checkpoint(tiny_model).weight_bytes(), rel=0.02)


def test_logits_that_are_not_finite_have_no_likeliest_token(tiny):
    tiny.decoder.final_norm.weight.fill_(torch.nan)
    assert not tiny.forward(one([5, 6])).isfinite().any()
    with pytest.raises(EngineError, match="not finite"):
        tiny.argmax(one([5, 6]))


# Batches


def one(tokens, table=(0, 1), context=None) -> Batch:
    """A batch of one sequence, of whose last token the logits are wanted."""
    n = len(tokens)
    return Batch(
        np.array(tokens, np.int32), np.array([0, n], np.int32), np.array([context or n], np.int32),
        np.array([table], np.int32), np.array([n - 1], np.int32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.array([3, 4])}, "tokens is int64 .2., expected int32 .any."),
        ({"tokens": np.array([3, 999], np.int32)}, "tokens has 999, expected 0 to 258"),
        ({"query_start": np.array([1, 2], np.int32)}, "begins with 1"),
        ({"query_start": np.array([0, 3], np.int32)}, "ends with 3, but there are 2 tokens"),
        ({"query_start": np.array([0, 1, 2], np.int32)}, "query_start is int32 .3., expected int32 .2."),
        ({"query_start": np.array([0, 2, 2], np.int32), "context_lens": np.array([2, 1], np.int32),
          "block_tables": np.zeros((2, 1), np.int32)}, "does not rise"),
        ({"context_lens": np.array([1], np.int32)}, "below what a sequence brings"),
        ({"context_lens": np.array([97], np.int32)}, "context_lens has 97, expected 1 to 96"),
        ({"context_lens": np.array([33], np.int32)}, "holds 2 blocks of a sequence that needs 3"),
        ({"block_tables": np.array([[8, 0]], np.int32)}, "block_tables has 8, expected 0 to 7"),
        ({"block_tables": np.array([[-1, 0]], np.int32)}, "block_tables has -1"),
        ({"block_tables": np.zeros((1, 4), np.int32)[:, ::2]}, "block_tables is not contiguous"),
        ({"logit_rows": np.array([2], np.int32)}, "logit_rows has 2, expected 0 to 1"),
    ],
)  # fmt: skip
def test_a_batch_that_makes_no_sense_is_named(tiny, changes, message):
    with pytest.raises(EngineError, match=f"batch: .*{message}"):
        tiny.forward(dataclasses.replace(one([3, 4]), **changes))


# Choice


def test_floats_and_the_oracle_are_the_references(tiny_model, monkeypatch, caplog):
    checkpoint = open_checkpoint(tiny_model)
    with caplog.at_level(logging.INFO, "gossamer.engine"):
        assert choose(checkpoint, weights="float").name == "reference"
        assert choose(checkpoint, "reference").name == "reference"
        monkeypatch.setenv("GOSSAMER_KERNELS", "reference")
        assert choose(checkpoint).name == "reference"
    reasons = ["weights are expanded to floats", "as asked", "GOSSAMER_KERNELS=reference"]
    assert [text.rpartition(": ")[2] for text in caplog.messages] == reasons
    assert all(text.startswith("backend reference (") for text in caplog.messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cpu", "weights": "float"}, "the cpu backend cannot be had for .*: weights are expanded"),
        ({"activations": "int8", "weights": "float"}, "int8 activations cannot be had"),
        ({"activations": "int8", "backend": "reference"}, "the reference backend, as asked, has none"),
        ({"kv_cache": "int8", "backend": "reference"}, "a KV cache in int8 cannot be had"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(tiny_model, monkeypatch, options, message):
    monkeypatch.setattr("gossamer.engine.reference.load_decoder", None)
    with pytest.raises(EngineError, match=message):
        LLM(tiny_model, **options)


@pytest.mark.parametrize(
    ("options", "name"), [({"backend": "gpu"}, "gpu"), ({"activations": "int4"}, "int4"), ({"weights": "half"}, "half")]
)
def test_a_choice_that_does_not_exist_is_refused(tiny_model, options, name):
    with pytest.raises(UnknownName, match=f"'{name}'"):
        LLM(tiny_model, **options)


def test_a_cpu_backend_that_cannot_run_a_model_says_why(tiny_model, monkeypatch):
    monkeypatch.setattr("gossamer.engine.cpu.supports", lambda checkpoint: "it has 3-bit weights")
    assert resolve(open_checkpoint(tiny_model)) == ("reference", "it has 3-bit weights")
    with pytest.raises(EngineError, match=r"the cpu backend cannot be had for .*: it has 3-bit weights"):
        LLM(tiny_model, backend="cpu")


def test_the_cache_is_estimated_for_the_backend_that_will_be_taken(tiny_model, monkeypatch):
    checkpoint = open_checkpoint(tiny_model)
    numbers = checkpoint.config.kv_elements_per_token()
    assert kv_bytes_per_token(checkpoint, "reference") == 4 * numbers
    assert kv_bytes_per_token(checkpoint, weights="float") == 4 * numbers
    monkeypatch.setattr("gossamer.engine.backend._obstacle", lambda *a: None)
    assert [kv_bytes_per_token(checkpoint, kv_cache=kind) for kind in ("auto", "bf16", "fp32")] == [
        2 * numbers, 2 * numbers, 4 * numbers,
    ]  # fmt: skip
    assert cache_bytes(1.5, rows=3, length=17) == 3 * 32 * 3 // 2


def test_an_estimate_is_never_below_what_a_backend_takes(case, ragged):
    backend, kv_cache, _ = case
    estimate = kv_bytes_per_token(open_checkpoint(ragged), backend.name, kv_cache=kv_cache)
    assert backend.kv_bytes_per_token <= estimate
