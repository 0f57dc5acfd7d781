"""A Ray cluster of several nodes on this machine, for tests: each node is a raylet of its own, with one CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

OBJECT_STORE_BYTES = 80 << 20
NODE = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
"""What a node that works has."""
PATIENCE = 120.0


@contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` whose head does no work, and so many nodes that do."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def busy_nodes(cluster: Any, command: str) -> list[Any]:
    """The nodes on which a process runs whose command line has this in it."""
    busy = []
    for node in cluster.worker_nodes:
        raylet = node.all_processes["raylet"][0].process.pid
        try:
            below = psutil.Process(raylet).children(recursive=True)
        except psutil.Error:
            continue
        if any(command in _command(process) for process in below):
            busy.append(node)
    return busy


def kill_a_busy_node(cluster: Any, command: str, killed: list[Any]) -> None:
    """Wait for a node on which this runs, and kill it as a power cut would."""
    deadline = time.monotonic() + PATIENCE
    while not killed and time.monotonic() < deadline:
        for node in busy_nodes(cluster, command)[:1]:
            cluster.remove_node(node, allow_graceful=False)
            killed.append(node)
        time.sleep(0.05)


def wait_until(true: Callable[[], Any], what: str) -> None:
    """Wait for something, but not for ever."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
