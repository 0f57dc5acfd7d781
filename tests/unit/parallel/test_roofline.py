"""Steps on paper: sums counted message by message, bytes and products counted on models, and ranks at work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine_batches import NUM_BLOCKS, random_steps
from gossamer.checkpoint import open_checkpoint
from gossamer.engine.sharded.part import Part
from gossamer.engine.sharded.view import plan_checkpoint
from gossamer.errors import UsageError
from gossamer.formats import Integer
from gossamer.parallel.plan import step_work
from gossamer.parallel.roofline import Link, Node, Stage, Work, estimate, place, sum_seconds
from parallel_models import together, write_model

SLOW = Link(bytes_per_s=1e6, latency_s=1e-3)
FAST = Link(bytes_per_s=1e9, latency_s=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_a_sum_is_the_messages_of_a_ring(ranks: int) -> None:
    """The ring itself: in each round every rank hands one chunk to the next, first adding, then replacing."""
    rng = np.random.default_rng(ranks)
    data = rng.normal(size=(ranks, ranks, 5))  # [rank, chunk, floats]
    wanted, seconds = data.sum(0), 0.0
    for phase in ("add", "replace"):
        for turn in range(ranks - 1):
            sent = [(r, (r - turn + (phase == "replace")) % ranks) for r in range(ranks)]
            chunks = [data[r, chunk].copy() for r, chunk in sent]
            for (r, chunk), values in zip(sent, chunks, strict=True):
                to = (r + 1) % ranks
                data[to, chunk] = values + (data[to, chunk] if phase == "add" else 0)
            seconds += SLOW.latency_s + 5 * 8 / SLOW.bytes_per_s  # all ranks at once
    assert np.allclose(data, wanted)
    assert sum(sum_seconds(SLOW, ranks, 8 * 5 * ranks)) == pytest.approx(seconds)


def test_sums_and_handovers_are_those_of_ranks_at_work(tmp_path) -> None:
    """Every float that ranks sum or hand on in one real step, beside what the plan says of a token."""
    checkpoint = open_checkpoint(write_model(tmp_path / "model"))
    plan = plan_checkpoint(checkpoint, 2, 2)
    step = next(s for s in random_steps(checkpoint.config, 0) if len(s.batch.logit_rows))
    counted = {}

    class Counting:
        def __init__(self, peers, rank):
            self.peers, self.seen = peers, counted.setdefault(rank, {"sums": 0, "bytes": 0.0, "sent": 0})

        def sum(self, tensor: torch.Tensor) -> None:
            self.seen["sums"] += 1
            self.seen["bytes"] += 2 * (plan.tp - 1) / plan.tp * tensor.nbytes
            self.peers.sum(tensor)

        def send(self, tensor: torch.Tensor) -> None:
            self.seen["sent"] += tensor.nbytes
            self.peers.send(tensor)

        def receive(self, tensor: torch.Tensor) -> None:
            self.peers.receive(tensor)

    def work(share, peers):
        part = Part.load(checkpoint, share, Counting(peers, share.rank), "reference")
        part.backend.reserve(NUM_BLOCKS)
        part.run("forward", step.batch)

    together(plan, work)
    forms = {name: checkpoint.format(name) for name in checkpoint.names()}
    stages, tokens = plan.stages(forms, 2), len(step.batch.tokens)
    hidden = 4 * checkpoint.config.hidden_size
    for rank, seen in counted.items():
        stage = stages[rank // plan.tp]
        assert seen["sums"] == stage.sums
        assert seen["bytes"] == stage.sums * 2 * (plan.tp - 1) / plan.tp * hidden * tokens
        assert seen["sent"] == (hidden * tokens if rank < plan.tp else 0)
    most = max(counted.values(), key=lambda seen: seen["bytes"])
    assert plan.wire_bytes_per_token() >= (most["bytes"] + most["sent"]) / tokens


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_the_tensors_of_the_file_and_multiplies_by_the_matrices(tied: bool, tmp_path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", tie_word_embeddings=tied))
    config = checkpoint.config
    nbytes = {name: checkpoint.nbytes(name) for name in checkpoint.names()}
    work = step_work(config, nbytes, True, 2)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    matrices = [s for name, s in shapes.items() if len(s) == 2 and "embed" not in name and "lm_head" not in name]
    table = config.vocab_size * config.hidden_size
    assert work.macs == sum(map(math.prod, matrices)) + table
    assert work.weight_bytes == 2 * (sum(map(math.prod, shapes.values())) - (0 if tied else table))
    assert work.kv_bytes == 2 * 2 * 3 * 4 * 16  # bytes, key and value, layers, heads, columns
    assert work.context_macs == 2 * 3 * 8 * 16


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 3), (2, 2)])
def test_ranks_share_what_one_process_does(tp: int, pp: int, tmp_path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", Integer(4, 16), tie_word_embeddings=False))
    forms = {name: checkpoint.format(name) for name in checkpoint.names()}
    nbytes = {name: checkpoint.nbytes(name) for name in checkpoint.names()}
    whole = step_work(checkpoint.config, nbytes, True, 2)
    plan = plan_checkpoint(checkpoint, tp, pp)
    ranks = [work for stage in plan.stages(forms, 2) for work in stage.ranks]
    assert sum(work.macs for work in ranks) == whole.macs
    assert sum(work.kv_bytes for work in ranks) == whole.kv_bytes
    assert sum(work.context_macs for work in ranks) == whole.context_macs
    twice = 7 * 2 * checkpoint.config.hidden_size + 22 * 2 * 8  # the norms, and the shape of each matrix, two int64
    assert sum(work.weight_bytes for work in ranks) == whole.weight_bytes + (tp - 1) * twice


def test_a_step_of_one_rank_is_the_slower_of_reading_and_arithmetic() -> None:
    work = Work(weight_bytes=1_000_000, kv_bytes=100, macs=500_000, context_macs=50)
    node = Node(bytes_per_s=1e9, macs_per_s=1e9)
    alone = estimate([Stage((work,), 0)], 64, [0], node, FAST, SLOW, batch=1, context=1000)
    assert alone.seconds == pytest.approx(1.1e-3)
    assert alone.bottleneck == "memory bandwidth"
    many = estimate([Stage((work,), 0)], 64, [0], node, FAST, SLOW, batch=16, context=1000)
    assert many.seconds == pytest.approx(16 * 0.55e-3)
    assert many.tokens_per_s == pytest.approx(1 / 0.55e-3)
    assert many.bottleneck == "compute"


def test_ranks_on_one_node_share_its_memory_and_ranks_apart_wait_for_the_link() -> None:
    halves = Stage((Work(500_000, 0, 1000, 0),) * 2, sums=5)
    node = Node(1e9, 1e12)
    together_ = estimate([halves], 64, [0, 0], node, FAST, SLOW, 1, 0)
    assert together_.memory == pytest.approx(1e-3)
    apart = estimate([halves], 64, [0, 1], node, FAST, SLOW, 1, 0)
    assert apart.memory == pytest.approx(0.5e-3)
    assert apart.link_latency == pytest.approx(5 * 2 * 1e-3)
    assert apart.link_transfer == pytest.approx(5 * 64 / 1e6)
    assert apart.bottleneck == "link latency"
    narrow = estimate([halves], 10_000_000, [0, 1], node, FAST, SLOW, 1, 0)
    assert narrow.bottleneck == "link bandwidth"


def test_stages_follow_each_other_and_hand_states_on() -> None:
    stage = Stage((Work(1_000_000, 0, 0, 0),), sums=0)
    step = estimate([stage] * 3, 1000, [0, 1, 1], Node(1e9, 1e9), FAST, SLOW, batch=2, context=0)
    assert step.memory == pytest.approx(3e-3)
    assert step.link_latency == pytest.approx(1e-3 + 1e-6)
    assert step.link_transfer == pytest.approx(2000 / 1e6 + 2000 / 1e9)
    assert step.seconds == pytest.approx(step.memory + step.link_latency + step.link_transfer)


def test_ranks_are_laid_on_nodes_in_order() -> None:
    assert place(4, 2) == [0, 0, 1, 1]
    assert place(3, 3) == [0, 1, 2]
    for ranks, nodes in ((4, 3), (2, 4), (1, 0)):
        with pytest.raises(UsageError, match="nodes"):
            place(ranks, nodes)
