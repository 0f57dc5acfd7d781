"""Micro-batches compute what the step that they were cut from would: the same tokens at the same places, in order."""

from __future__ import annotations

import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_batches import NUM_BLOCKS, expected_logits, random_steps
from gossamer.checkpoint import open_checkpoint
from gossamer.engine.backend import BLOCK_SIZE
from gossamer.engine.reference import ReferenceBackend
from gossamer.engine.sharded import micro
from gossamer.engine.sharded.micro import micro_batches
from gossamer.engine.sharded.ranks import Ranks, Watch
from gossamer.parallel.wire import Message, Wire
from parallel_models import write_model

SECONDS = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_checkpoint(write_model(tmp_path_factory.mktemp("micro") / "model"))


def places(batch):
    """Of each token: itself, its position, and the slot of the cache that it goes to."""
    found = []
    for row, start in enumerate(batch.query_start[:-1].tolist()):
        for token in range(start, batch.query_start[row + 1]):
            position = int(batch.context_lens[row]) - int(batch.query_start[row + 1]) + token
            block = int(batch.block_tables[row, position // BLOCK_SIZE])
            found.append((int(batch.tokens[token]), position, block * BLOCK_SIZE + position % BLOCK_SIZE))
    return found


@given(seed=st.integers(0, 1 << 16), stages=st.integers(2, 4), least=st.integers(1, 40))
def test_every_token_is_in_one_part_at_its_place_and_every_result_too(model, seed, stages, least):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro, "MIN_TOKENS", least)
        for step in random_steps(model.config, seed, steps=4):
            parts = micro_batches(step.batch, stages)
            tokens = len(step.batch.tokens)
            assert len(parts) == max(1, min(2 * stages, tokens // least))
            assert [place for part, _ in parts for place in places(part)] == places(step.batch)
            for part, results in parts:
                part.check(model.config, NUM_BLOCKS)
                assert tokens // len(parts) <= len(part.tokens) <= -(-tokens // len(parts))
                rows = step.batch.logit_rows[results]
                assert (part.tokens[part.logit_rows] == step.batch.tokens[rows]).all()
            assert sorted(np.concatenate([results for _, results in parts])) == [*range(len(step.batch.logit_rows))]


def test_parts_computed_in_turn_give_the_results_of_the_step(model, monkeypatch):
    """Sequences are cut in the middle, so a part sees keys and values of the one before."""
    monkeypatch.setattr(micro, "MIN_TOKENS", 3)
    backend = ReferenceBackend.load(model)
    backend.reserve(NUM_BLOCKS)
    for step in random_steps(model.config, 3):
        expected = expected_logits(backend.decoder, step)
        logits = torch.empty_like(expected)
        for part, results in micro_batches(step.batch, 3):
            logits[results] = backend.forward(part)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_stage_begins_a_part_while_the_next_stage_is_still_at_the_one_before():
    """The second stage ends its first part only when the first stage has begun the second part."""
    ranks = Ranks(2, 1, Watch(), None)
    begun, handed_on = threading.Event(), queue.SimpleQueue()

    def first(wire):
        for part in range(2):
            wire.receive()
            if part == 1:
                begun.set()
            handed_on.put(part)
            wire.send(Message("done"))

    def second(wire):
        for part in range(2):
            wire.receive()
            assert handed_on.get(timeout=SECONDS) == part
            in_time = begun.wait(SECONDS)
            wire.send(Message("done", {"part": part, "overlap": in_time}))

    pairs = [socket.socketpair() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for ours, _ in pairs:
            ranks._attach(Wire(ours))
        stages = [pool.submit(work, Wire(end)) for work, (_, end) in zip((first, second), pairs, strict=True)]
        answers = ranks.ask_in_turn([Message("step"), Message("step")])
        for stage in stages:
            stage.result(SECONDS)
    assert [dict(answer[1].values) for answer in answers] == [{"part": part, "overlap": True} for part in range(2)]
    ranks.kill()
    for _, end in pairs:
        end.close()


def test_small_steps_and_single_stages_are_not_cut(model):
    (step, *_) = random_steps(model.config, 1)
    for stages, least in ((1, 1), (2, len(step.batch.tokens))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(micro, "MIN_TOKENS", least)
            ((part, results),) = micro_batches(step.batch, stages)
        assert places(part) == places(step.batch)
        assert (results == np.arange(len(step.batch.logit_rows))).all()
