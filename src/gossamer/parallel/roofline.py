"""How long a step of a model in parts takes on paper: bytes over bandwidth, products over their rate, sums over links.

A rank takes as long as the slower of its reading and its arithmetic (the roofline, Williams et al., CACM 2009); a sum
over p ranks is a ring, 2 (p - 1) messages one after the other, each of a p-th of the bytes (Thakur et al., IJHPCA
2005); stages follow each other. Overlap, stragglers and the scheduler are left out: no step can be faster than this.
Knows numbers only: no torch, no model and no machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Link:
    """What carries messages between two ranks."""

    bytes_per_s: float
    latency_s: float
    """Of each message, however short."""


@dataclass(frozen=True)
class Node:
    """A machine, or whatever has a memory of its own: all ranks on it share these."""

    bytes_per_s: float
    """At which it reads weights, keys and values."""
    macs_per_s: float
    """Products with their sums."""


@dataclass(frozen=True)
class Work:
    """What a rank does in a step."""

    weight_bytes: int
    """Read once, whatever the batch."""
    kv_bytes: int
    """Read for each token of context."""
    macs: int
    """For each token that is computed."""
    context_macs: int
    """For each token that is computed and each token of its context."""


@dataclass(frozen=True)
class Stage:
    """Ranks that share some layers."""

    ranks: tuple[Work, ...]
    sums: int
    """Over its ranks, in each step."""


@dataclass(frozen=True)
class Step:
    """Seconds of one step that gives each of `batch` sequences a token, and what they are spent on."""

    batch: int
    compute: float
    """Of the ranks alone: the slower of arithmetic and memory in every stage."""
    memory: float
    arithmetic: float
    link_latency: float
    link_transfer: float

    @property
    def seconds(self) -> float:
        return self.compute + self.link_latency + self.link_transfer

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.seconds

    @property
    def bottleneck(self) -> str:
        """What most of the step waits for."""
        of_rank = ("memory bandwidth", self.memory) if self.memory >= self.arithmetic else ("compute", self.arithmetic)
        parts = (of_rank, ("link latency", self.link_latency), ("link bandwidth", self.link_transfer))
        return max(parts, key=lambda part: part[1])[0]


def place(ranks: int, nodes: int) -> list[int]:
    """The node of each rank: as many on each, in order. Raises UsageError."""
    if nodes < 1 or ranks % nodes:
        raise UsageError(f"{ranks} ranks on {nodes} nodes", hint="--tp times --pp must be a multiple of --nodes")
    return [rank // (ranks // nodes) for rank in range(ranks)]


def sum_seconds(link: Link, ranks: int, nbytes: float) -> tuple[float, float]:
    """Seconds of latency and of transfer of one ring all-reduce of so many bytes."""
    messages = 2 * (ranks - 1)
    return messages * link.latency_s, messages / ranks * nbytes / link.bytes_per_s


def estimate(
    stages: Sequence[Stage], hidden_bytes: int, homes: Sequence[int], node: Node, inside: Link, between: Link,
    batch: int, context: int,
) -> Step:  # fmt: skip
    """One step of `batch` sequences with `context` tokens each.

    `hidden_bytes`: of one token's hidden state; `homes`: node of each rank, stage after stage; `inside`, `between`:
    links of ranks on one node and on different ones. A ring that leaves a node is as slow as its slowest link.
    """
    homes_left = iter(homes)
    places = [list(itertools.islice(homes_left, len(stage.ranks))) for stage in stages]
    compute = memory = arithmetic = latency = transfer = 0.0
    for stage, nodes in zip(stages, places, strict=True):
        reading, counting = _of_ranks(stage, nodes, node, batch, context)
        memory, arithmetic = memory + reading, arithmetic + counting
        compute += max(reading, counting)
        link = inside if len(set(nodes)) == 1 else between
        waits, moves = sum_seconds(link, len(nodes), batch * hidden_bytes)
        latency, transfer = latency + stage.sums * waits, transfer + stage.sums * moves
    for before, after in itertools.pairwise(places):
        link = inside if before == after or set(before) == set(after) else between
        latency, transfer = latency + link.latency_s, transfer + batch * hidden_bytes / link.bytes_per_s
    return Step(batch, compute, memory, arithmetic, latency, transfer)


def _of_ranks(stage: Stage, nodes: Sequence[int], node: Node, batch: int, context: int) -> tuple[float, float]:
    """Seconds of reading and of arithmetic of a stage: those of its busiest node, whose ranks share what it has."""
    reading, counting = dict.fromkeys(nodes, 0.0), dict.fromkeys(nodes, 0.0)
    for work, home in zip(stage.ranks, nodes, strict=True):
        reading[home] += (work.weight_bytes + batch * context * work.kv_bytes) / node.bytes_per_s
        counting[home] += batch * (work.macs + context * work.context_macs) / node.macs_per_s
    return max(reading.values()), max(counting.values())
