"""Blocks are dealt out and come back; rows are brought up to date whatever is lost, and leave one by one."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from gossamer.checkpoint import memory, open_checkpoint
from gossamer.engine import runner
from gossamer.engine.reference import ReferenceBackend
from gossamer.engine.runner import KVPool, Rows
from gossamer.errors import DoesNotFit


@pytest.fixture(scope="module")
def backend(tiny_model):
    return ReferenceBackend.load(open_checkpoint(tiny_model))


@pytest.fixture
def pool(backend):
    backend.reserve(0)
    return KVPool(backend)


def test_no_block_has_two_holders_and_all_come_back(pool):
    held = [pool.take(n) for n in (3, 1, 4)]
    assert sorted(chain(*held)) == list(range(8))
    pool.give(held.pop(0))
    held.append(pool.take(5))
    assert len(set(chain(*held))) == 10 == pool.size
    assert pool.backend.num_blocks == 10
    for blocks in held:
        pool.give(blocks)
    assert pool.free == pool.size


def test_a_pool_grows_only_when_its_blocks_run_out(pool):
    blocks = pool.take(4)
    epoch = pool.epoch
    pool.give(blocks)
    assert sorted(pool.take(4)) == sorted(blocks)
    assert pool.epoch == epoch
    pool.take(1)
    assert pool.epoch == epoch + 1


def test_a_pool_that_cannot_grow_is_as_it_was(pool, monkeypatch):
    pool.take(2)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    with pytest.raises(DoesNotFit):
        Rows(pool, [[1, 2]], [100])
    assert (pool.size, pool.free, pool.epoch) == (2, 0, 1)


def test_memory_is_given_back_only_if_nobody_holds_a_block(pool):
    blocks = pool.take(2)
    pool.release()
    assert pool.backend.num_blocks == pool.size == 2
    pool.give(blocks)
    pool.release()
    assert pool.backend.num_blocks == pool.size == pool.nbytes == 0


def test_rows_go_on_as_the_whole_text_would(pool):
    texts = [[5, 6, 7, 8, 9], [20], list(range(30, 65))]
    with Rows(pool, texts, [48] * 3) as rows:
        for token in (9, 40, 7):
            assert_whole(pool.backend, rows.forward(), texts)
            texts = [[*text, token] for text in texts]
            rows.append([token] * 3)
        rows.drop(0)
        assert_whole(pool.backend, rows.forward(), texts[1:])
        assert len(rows) == 2
        assert rows.lengths == [4, 38]
    assert pool.free == pool.size


def test_rows_whose_cache_was_lost_are_computed_again(pool):
    with Rows(pool, [[5, 6, 7], [8] * 20], [32, 32]) as rows:
        rows.forward()
        with Rows(pool, [[9] * 90], [96]) as others:
            assert_whole(pool.backend, others.forward(), [[9] * 90])
            rows.append([1, 2])
            assert_whole(pool.backend, rows.forward(), [[5, 6, 7, 1], [*[8] * 20, 2]])
            others.append([3])
            assert_whole(pool.backend, others.forward(), [[*[9] * 90, 3]])


def test_a_step_reads_no_more_than_its_chunk_of_each_row_and_its_room_for_all(pool, monkeypatch):
    steps = []
    real = type(pool.backend).forward
    monkeypatch.setattr(
        type(pool.backend), "forward",
        lambda self, batch: steps.append((batch.query_lens.tolist(), len(batch.logit_rows))) or real(self, batch),
    )  # fmt: skip
    monkeypatch.setattr(runner, "CHUNK", 8)
    monkeypatch.setattr(runner, "CHUNK_TOKENS", 20)
    with Rows(pool, [[1] * 10, [2] * 3, [3] * 20], [32] * 3) as rows:
        rows.forward()
    assert steps == [([8, 3, 8], 1), ([2, 8], 1), ([4], 1)]


def test_likeliest_tokens_are_those_of_the_logits(pool):
    with Rows(pool, [[5, 6], [7] * 20], [32] * 2) as rows:
        logits = rows.forward()
        rows.append([1, 1])
        likeliest = rows.argmax()
    with Rows(pool, [[5, 6, 1], [*[7] * 20, 1]], [32] * 2) as rows:
        assert torch.equal(likeliest, rows.forward().argmax(-1))
    assert logits.shape == (2, 259)


def assert_whole(backend: ReferenceBackend, logits: torch.Tensor, texts: list[list[int]]) -> None:
    """These are the logits of the Decoder after whole texts."""
    expected = torch.stack([backend.decoder(torch.tensor([text]), last_only=True)[0, 0] for text in texts])
    assert (logits - expected).abs().max() < 1e-4
