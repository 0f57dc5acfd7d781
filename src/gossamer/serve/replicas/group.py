"""The nodes of a replica whose model several of them hold: the engine is on its own, a task on each other one.

Ray Serve puts the replica into a placement group of as many bundles, no two on one node. A task in each of the others
does what `gossamer join` does, for every engine that the replica starts: the first one, and those that take the place
of one that was lost. If its node is lost Ray begins it on another, and the replica's next engine finds it there; the
tasks end with the replica.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable
from typing import Any

from ... import settings
from ...cluster.place import Place
from ...engine.sharded.nodes import Nodes
from ...errors import GossamerError

SECONDS_BETWEEN_ENGINES = 1.0

logger = logging.getLogger("gossamer.serve")


def gathered(nodes: int, place: Place, threads: int) -> tuple[Nodes, list[Awaitable[Any]]]:
    """Where the engine of this replica lets ranks in, and the tasks that bring them; none ends but by an error.

    They know a token that is made here: Ray carries it to them, encrypted if the cluster is (`RAY_USE_TLS`).
    """
    import ray
    from ray.util import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    meeting = Nodes(nodes, *_free_address(ray))
    token = os.environ[settings.JOIN_TOKEN] = secrets.token_hex(32)  # the engine's process inherits it
    bundle = PlacementGroupSchedulingStrategy(get_current_placement_group())
    hold = ray.remote(num_cpus=threads, max_retries=-1, scheduling_strategy=bundle)(_hold)
    return meeting, [hold.remote((meeting.host, meeting.port), token, place, threads) for _ in range(nodes - 1)]


def _free_address(ray: Any) -> tuple[str, int]:
    """An address of this node by which the cluster reaches it, and a port that is free there."""
    here = ray.get_runtime_context().get_node_id()
    host = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    with socket.create_server((host, 0)) as free:
        return host, free.getsockname()[1]


def _hold(address: tuple[str, int], token: str, place: Place, threads: int) -> None:
    """Hold ranks of one engine after another. Raises ClusterError if this node cannot: it sees other files."""
    from ...engine.sharded.join import join

    place.take()
    os.environ |= {settings.JOIN_TOKEN: token, "GOSSAMER_THREADS": str(threads)}
    while True:
        try:
            join(address)
        except GossamerError as error:  # the engine says the same to whoever waits for it
            logger.warning("%s", error)
        time.sleep(SECONDS_BETWEEN_ENGINES)
