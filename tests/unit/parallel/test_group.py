"""Sums over processes by gloo, as small and as large tensors go."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from gossamer.parallel.group import GATHERED_BYTES, ProcessGroup

RANKS = 3
SHAPES = [(1, 5), (7, 64), (GATHERED_BYTES // 4,), (3, GATHERED_BYTES // 4 + 1)]


def parts(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def work(rank, store, end):
    group = ProcessGroup(rank, RANKS, 1, store, 60.0)
    tensors = parts(rank)
    for tensor in tensors:
        group.sum(tensor)
    end.send([tensor.numpy() for tensor in tensors])
    end.recv()  # nobody goes before all have answered
    os._exit(0)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_sum_is_that_of_all_ranks_and_the_same_on_each(tmp_path):
    context = multiprocessing.get_context("fork")  # torch is loaded already
    pipes = [context.Pipe() for _ in range(RANKS)]
    processes = [
        context.Process(target=work, args=(rank, str(tmp_path / "store"), theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        assert all(ours.poll(60) for ours, _ in pipes)
        found = [ours.recv() for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    exact = [sum(each).float() for each in zip(*([t.double() for t in parts(r)] for r in range(RANKS)), strict=True)]
    for expected, *sums in zip(exact, *found, strict=True):
        for total in sums:
            torch.testing.assert_close(torch.from_numpy(total), expected, atol=1e-6, rtol=1e-6)
            assert (total == sums[0]).all()
