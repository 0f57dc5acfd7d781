"""The C++ executor as a whole against the Decoder, on every instruction set: random steps of random ragged models.

Bounds are relative to the spread of the logits. With a float32 cache and exact activations only the order of sums
differs. bfloat16 keeps 8 bits of keys and values, int8 7 bits of the largest in a head, int4 16 steps from least to
largest; int8 activations 7 bits of a block.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_batches import NUM_BLOCKS, RAGGED, check, random_steps
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.engine.backend import BLOCK_SIZE, KV_DTYPES, Batch, blocks_for, kv_bytes_per_token
from gossamer.engine.cpu import CpuBackend
from gossamer.errors import EngineError
from gossamer.model.decoder import Block, Decoder
from kv_codes import stored

SEEDS = range(3)
WIDE = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 70}
"""Many heads to one, narrower than any vector, and widths that fill neither tiles nor blocks."""


@pytest.fixture(scope="module", params=["dense", "packed", "biases", "some biases", "wide", "packed-gelu"])
def folder(request, write_tiny_model, tmp_path_factory):
    changes = {"max_position_embeddings": 300}
    if request.param == "wide":
        changes |= WIDE | {"num_hidden_layers": 2}
    else:
        changes |= {"num_hidden_layers": len(RAGGED), "gossamer_layers": RAGGED}
    if request.param == "biases":
        changes |= {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    if request.param == "some biases":
        roles = [["o", "down"], ["k", "up"], [], ["q", "v", "gate"]]
        rows = [row | {"biases": roles[i % len(roles)]} for i, row in enumerate(RAGGED)]
        changes |= {"gossamer_layers": rows}
    if request.param == "packed-gelu":
        changes |= {"hidden_act": "gelu_pytorch_tanh"}
    path = tmp_path_factory.mktemp("models") / request.param
    return write_tiny_model(path, packed=request.param.startswith("packed"), **changes)


@pytest.fixture(scope="module")
def oracle(folder) -> Decoder:
    return load_decoder(open_checkpoint(folder))


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.3), ("int8", 0.5)])
@pytest.mark.parametrize("threads", [1, 3])
def test_random_steps(isa, folder, oracle, kv_dtype, tolerance, threads) -> None:
    backend = CpuBackend(open_checkpoint(folder), activations="exact", kv_dtype=kv_dtype, threads=threads)
    for seed in SEEDS:
        check(backend, oracle, random_steps(backend.config, seed), tolerance)


def held(x: torch.Tensor) -> torch.Tensor:
    """What an int4 cache holds of keys or values [batch, time, heads, head_dim]."""
    return stored(x.reshape(-1, x.shape[-1]))[0].float().view(x.shape)


def attend_to_codes(self, q, k, v, rotation, cache):
    """Block.attend with keys and values as an int4 cache holds them."""
    c, by_head = self.layer, (*q.shape[:2], -1, self.layer.head_dim)
    k, v = held(rotation.apply(k.view(by_head), self.rope)), held(v.view(by_head))
    keys, values = (t.repeat_interleave(c.group, dim=2).transpose(1, 2) for t in (k, v))
    queries = rotation.apply(q.view(by_head), self.rope).transpose(1, 2)
    mixed = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return mixed.transpose(1, 2).reshape(q.shape)


def test_an_int4_cache_is_that_of_rounded_keys_and_values(isa, folder, monkeypatch) -> None:
    """A number between two codes may get either, and attention is sharp: it moves logits by a part of their spread."""
    monkeypatch.setattr(Block, "attend", attend_to_codes)
    oracle = load_decoder(open_checkpoint(folder))
    backend = CpuBackend(open_checkpoint(folder), activations="exact", kv_dtype="int4", threads=2)
    for seed in SEEDS:
        check(backend, oracle, random_steps(backend.config, seed), 0.35)


def test_eight_bit_activations_move_logits_a_little(isa, folder, oracle) -> None:
    backend = CpuBackend(open_checkpoint(folder), kv_dtype="fp32", threads=2)
    if not backend.integers:
        assert backend.activations == "exact"
        return
    assert backend.activations == "int8"
    check(backend, oracle, random_steps(backend.config, 7), 1.0)


def test_a_long_context_is_split_among_threads(isa, write_tiny_model, tmp_path) -> None:
    """One sequence of 1000 tokens, by chunks and then token by token, as one reading of all of it."""
    path = write_tiny_model(tmp_path / "long", max_position_embeddings=1100)
    oracle = load_decoder(open_checkpoint(path))
    backend = CpuBackend(open_checkpoint(path), kv_dtype="fp32", threads=3)
    backend.reserve(70)
    tokens = np.random.default_rng(0).integers(0, backend.config.vocab_size, 1010).astype(np.int32)
    expected = oracle(torch.from_numpy(tokens.astype(np.int64))[None])[0]
    start = 0
    for count in [400, 1, 599, *[1] * 10]:
        found = backend.forward(_one(tokens[start : start + count], start + count))
        start += count
        assert float((found[0] - expected[start - 1]).abs().max()) < 2e-4 * float(expected.std())


def test_the_same_step_gives_the_same_bits(folder) -> None:
    backend = CpuBackend(open_checkpoint(folder), threads=2)
    backend.reserve(4)
    step = _one(np.arange(3, 40, dtype=np.int32), 37)
    first = backend.forward(step)
    for _ in range(20):
        assert torch.equal(backend.forward(step), first)


@pytest.mark.parametrize("activations", ["auto", "exact"])
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
def test_logits_have_the_same_bits_in_any_batch_and_any_chunks(isa, folder, activations, kv_dtype) -> None:
    backend = CpuBackend(open_checkpoint(folder), activations=activations, kv_dtype=kv_dtype, threads=2)
    length, many = backend.config.max_positions, 20
    backend.reserve(many * blocks_for(length))
    tables = np.random.default_rng(1).permutation(many * blocks_for(length)).astype(np.int32).reshape(many, -1)
    tokens = np.random.default_rng(0).integers(0, backend.config.vocab_size, length).astype(np.int32)

    def read(*chunks: int, sequence: int = 0) -> torch.Tensor:
        rows, end = [], 0
        for count in chunks:
            end += count
            starts, wanted = np.array([0, count], np.int32), np.arange(count, dtype=np.int32)
            context = np.array([end], np.int32)
            rows.append(backend.forward(Batch(tokens[end - count : end], starts, context, tables[[sequence]], wanted)))
        return torch.cat(rows)

    whole = read(length)
    assert torch.equal(read(*[1] * length), whole)
    assert torch.equal(read(*[7] * (length // 7), length % 7), whole)
    for sequence in range(many):
        read(length - 1, sequence=sequence)
    starts = np.arange(many + 1, dtype=np.int32)
    together = Batch(np.repeat(tokens[-1:], many), starts, np.full(many, length, np.int32), tables, starts[:-1])
    assert torch.equal(backend.forward(together), whole[-1:].expand(many, -1))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_bytes_of_a_token_are_those_of_its_part_of_a_block(folder, kv_dtype) -> None:
    backend = CpuBackend(open_checkpoint(folder), kv_dtype=kv_dtype)
    backend.reserve(3)
    assert backend.kv_bytes_per_token * BLOCK_SIZE == backend._model.block_bytes
    assert kv_bytes_per_token(open_checkpoint(folder), kv_cache=kv_dtype) == backend.kv_bytes_per_token


def test_logits_that_are_no_numbers_are_reported(write_tiny_model, tmp_path) -> None:
    path = write_tiny_model(tmp_path / "broken")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    backend = CpuBackend(open_checkpoint(path), threads=2)
    backend.reserve(1)
    with pytest.raises(EngineError, match="not finite"):
        backend.argmax(_one(np.array([3, 4], np.int32), 2))


class TestRefusals:
    """Steps that make no sense raise EngineError in words, and leave the model as it was."""

    @pytest.fixture
    def backend(self, tiny_model) -> CpuBackend:
        backend = CpuBackend(open_checkpoint(tiny_model))
        backend.reserve(4)
        return backend

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"tokens": [-1, 4]}, "tokens has -1"),
            ({"tokens": [3, 1 << 30]}, "tokens has"),
            ({"tokens": []}, "query_start ends with 2"),
            ({"query_start": [0, 1]}, "query_start ends with 1"),
            ({"query_start": [1, 2]}, "query_start begins with 1"),
            ({"query_start": [0]}, "query_start is int32"),
            ({"context_lens": [1]}, "context_lens"),
            ({"context_lens": [1 << 30]}, "context_lens"),
            ({"block_tables": [[4]]}, "block_tables has 4"),
            ({"block_tables": [[-1]]}, "block_tables has -1"),
            ({"logit_rows": [2]}, "logit_rows has 2"),
            ({"logit_rows": [-1]}, "logit_rows has -1"),
        ],
    )
    @pytest.mark.parametrize("method", ["forward", "hidden", "argmax"])
    def test_batches(self, backend, change, words, method) -> None:
        fields = {
            "tokens": [3, 4], "query_start": [0, 2], "context_lens": [2], "block_tables": [[0]], "logit_rows": [1],
        }  # fmt: skip
        good = Batch(**{k: np.array(v, np.int32) for k, v in fields.items()})
        before = backend.forward(good)
        bad = Batch(**{k: np.array(v, np.int32) for k, v in (fields | change).items()})
        with pytest.raises(EngineError, match=words):
            getattr(backend, method)(bad)
        assert torch.equal(backend.forward(good), before)

    def test_dtypes_and_layouts(self, backend) -> None:
        good = _one(np.array([3, 4], np.int32), 2)
        for bad in (
            Batch(good.tokens.astype(np.int64), *_rest(good)),
            Batch(np.array([3, 0, 4, 0], np.int32)[::2], *_rest(good)),
        ):
            with pytest.raises(EngineError, match="tokens"):
                backend.forward(bad)

    def test_a_step_before_there_is_a_cache(self, tiny_model) -> None:
        with pytest.raises(EngineError, match="block"):
            CpuBackend(open_checkpoint(tiny_model)).forward(_one(np.array([3], np.int32), 1))

    def test_states_of_another_width(self, backend) -> None:
        with pytest.raises(EngineError, match="states"):
            backend.head(torch.zeros(2, 3))


def test_ten_thousand_steps_leave_memory_as_it_was(tiny_model) -> None:
    import psutil

    backend = CpuBackend(open_checkpoint(tiny_model), threads=2)
    steps = [s.batch for s in random_steps(backend.config, 1)]
    backend.reserve(NUM_BLOCKS)

    def run(count: int) -> int:
        for i in range(count):
            (backend.forward if i % 2 else backend.argmax)(steps[i % len(steps)])
        return int(psutil.Process().memory_info().rss)

    before = run(500)
    assert run(10_000) - before < 4 << 20


def test_touching_takes_the_cache_s_memory_and_loses_nothing(folder) -> None:
    import psutil

    backend = CpuBackend(open_checkpoint(folder), kv_dtype="fp32", threads=2)
    backend.reserve(int((64 << 20) // (backend.kv_bytes_per_token * BLOCK_SIZE)))
    backend.forward(_one(np.arange(3, 40, dtype=np.int32), 37))
    step = _one(np.array([5], np.int32), 38)
    expected, before = backend.forward(step), psutil.Process().memory_info().rss
    backend.touch()
    assert psutil.Process().memory_info().rss - before > 48 << 20  # but for what the two steps took
    assert torch.equal(backend.forward(step), expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads take turns of their own length on Linux")
def test_threads_of_a_step_take_short_turns_and_keep_their_priority(folder) -> None:
    if _turn(0)[1] == 0:
        pytest.skip("this Linux has one length of turns for all threads")
    backend = CpuBackend(open_checkpoint(folder), threads=3)
    backend.reserve(4)
    found: list[dict[int, tuple[int, int]]] = []

    def step() -> None:
        backend.forward(_one(np.arange(3, 40, dtype=np.int32), 37))
        found.append({int(task): _turn(int(task)) for task in os.listdir("/proc/self/task")})

    caller = threading.Thread(target=step)
    caller.start()
    caller.join()
    short = [task for task, (_, turn) in found[0].items() if turn == 100_000]
    assert caller.native_id in short
    assert len(short) >= 3  # with the team's own two
    assert {found[0][task][0] for task in short} == {os.getpriority(os.PRIO_PROCESS, 0)}


def _turn(task: int) -> tuple[int, int]:
    """A thread's nice value, and nanoseconds for which it may keep a core that others want."""
    attributes = ctypes.create_string_buffer(48)
    getattr_number = 315 if platform.machine() == "x86_64" else 275
    assert ctypes.CDLL(None).syscall(getattr_number, task, attributes, 48, 0) == 0
    _, _, _, nice, _, turn, _, _ = struct.unpack("IIQiIQQQ", attributes.raw)
    return nice, turn


def _one(tokens: np.ndarray, context: int) -> Batch:
    """A step of one sequence in the first blocks; the result of its last token."""
    return Batch(
        tokens=np.ascontiguousarray(tokens, np.int32),
        query_start=np.array([0, len(tokens)], np.int32),
        context_lens=np.array([context], np.int32),
        block_tables=np.arange(70, dtype=np.int32)[None],
        logit_rows=np.array([len(tokens) - 1], np.int32),
    )


def _rest(batch: Batch) -> tuple[np.ndarray, ...]:
    return batch.query_start, batch.context_lens, batch.block_tables, batch.logit_rows
