"""Replicas on a Ray cluster, through Ray Serve: started, asked, counted, removed. Knows no HTTP.

Ray Serve keeps the number of replicas: it starts another one for each whose node is lost, whose process ends or whose
health check fails, and with `most` it starts more under load. Its controller outlives this process, so that replicas
whose command was killed stay until the same command is given again, which takes them over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Scope

from ...cluster.place import Place
from ...errors import ClusterError
from ..client import Watch
from ..service import Limits
from .front import ReplicaLost
from .replica import Replica, Specs

ROUTER = "gossamer.serve.replicas.router.PrefixRouter"
NAME = "replica"
"""Of the deployment in its application."""
SECONDS_BETWEEN_CHECKS = 2.0
SECONDS_OF_A_CHECK = 30.0
SECONDS_TO_GATHER = 5.0
TRIES = 3
"""How often a replica that cannot be made is tried again."""


@dataclass(frozen=True)
class Scale:
    """How many replicas, and what each is given."""

    count: int
    most: int
    """Of them under load; `count` for no more."""
    threads: int
    """CPUs of each, on each of its nodes."""
    max_sequences: int
    """Completions that run together in each."""
    nodes: int = 1
    """That hold parts of the model of each."""

    def number(self) -> dict[str, Any]:
        """How many there are to be, as Ray Serve is told it."""
        from ray.serve.config import AutoscalingConfig

        if self.most == self.count:
            return {"num_replicas": self.count}
        aim = max(1, self.max_sequences // 2)
        scaling = AutoscalingConfig(min_replicas=self.count, max_replicas=self.most, target_ongoing_requests=aim)
        return {"autoscaling_config": scaling}

    def room(self) -> dict[str, Any]:
        """What each takes of the cluster: CPUs of one node, or of several, no two of its parts on the same."""
        own = {"ray_actor_options": {"num_cpus": self.threads}}
        if self.nodes == 1:
            return own
        bundles = [{"CPU": float(self.threads)}] * self.nodes
        return own | {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_SPREAD"}


class Deployment:
    """The replicas of one command; to be removed in any case."""

    def __init__(self, ray: Any, name: str) -> None:
        self._ray, self._name = ray, name
        self._handle: Any = None

    def start(self, specs: Specs, scale: Scale, limits: Limits, watch: Watch) -> None:
        """Have `count` replicas. Raises ClusterError: no room for them, or they cannot be made."""
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # once it is imported, for that sets it
        _require_room(self._ray, scale)
        router = RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs={"slack": max(1, scale.max_sequences // 4)}
        )
        deployment = serve.deployment(
            name=NAME,
            max_ongoing_requests=scale.max_sequences + limits.max_queue,
            health_check_period_s=SECONDS_BETWEEN_CHECKS,
            health_check_timeout_s=SECONDS_OF_A_CHECK,
            max_constructor_retry_count=TRIES,
            request_router_config=router,
            **scale.room(),
            **scale.number(),
        )(Replica)
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
        bound = deployment.bind(specs, limits, watch, Place(), scale.threads, scale.nodes)
        try:
            self._handle = serve.run(bound, name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise ClusterError(f"no replica could be started: {self._why() or error}") from error

    def remove(self) -> None:
        """End the replicas, and Ray Serve if it has nothing else to do."""
        from ray import serve

        if self._name in serve.status().applications:
            serve.delete(self._name)
        if not serve.status().applications:
            serve.shutdown()

    def running(self) -> int:
        """Replicas that can be asked."""
        from ray import serve

        application = serve.status().applications.get(self._name)
        if application is None or NAME not in application.deployments:
            return 0
        return sum(n for state, n in application.deployments[NAME].replica_states.items() if state == "RUNNING")

    async def ask(self, scope: Scope, body: bytes, chosen_by: str) -> AsyncGenerator[list[Message], None]:
        """Have a replica answer. Raises ReplicaLost."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        method = self._handle.options(method_name="answer", stream=True, session_id=chosen_by)
        replies = method.remote(scope, body)
        try:
            async for messages in replies:
                yield messages
        except GeneratorExit:
            replies.cancel()
            raise
        except asyncio.CancelledError as error:
            if _is_cancelled():
                replies.cancel()
                raise
            raise ReplicaLost("the replica that answered was ended") from error
        except RayTaskError:  # a mistake of ours
            raise
        except (RayError, RayServeException) as error:
            raise ReplicaLost("the replica that answered was lost") from error

    async def gather(self) -> list[tuple[str, bytes]]:
        """The metrics of all replicas that answer in time."""
        asked = self._handle.broadcast("metrics")
        try:
            found = await asked.results_async(timeout_s=SECONDS_TO_GATHER, return_exceptions=True)
        except TimeoutError:
            return []
        return [answer for answer in found if not isinstance(answer, BaseException)]

    def _why(self) -> str | None:
        """What Ray Serve says of an application that could not be started: the last line of it."""
        from ray import serve

        application = serve.status().applications.get(self._name)
        if application is None:
            return None
        messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
        lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "Error" in line or "Lost" in line), None)


def _is_cancelled() -> bool:
    """True if it is this task that is cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _require_room(ray: Any, scale: Scale) -> None:
    """Raise ClusterError if the cluster has too few CPUs, for Ray would wait for more."""
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    slots = [int(cpus // scale.threads) for cpus in nodes]
    room = most_replicas(slots, scale.nodes)
    if room < scale.count:
        where = "" if scale.nodes == 1 else f" on each of {scale.nodes} nodes"
        raise ClusterError(
            f"{scale.count} replicas of {scale.threads} CPUs each{where} do not fit on nodes of "
            f"{', '.join(f'{cpus:g}' for cpus in nodes)} CPUs",
            hint=f"GOSSAMER_THREADS says how many each takes; there is room for {room}",
        )


def most_replicas(slots: Sequence[int], nodes: int) -> int:
    """How many replicas fit, each with a slot on so many different nodes, where every node has `slots` of them."""
    most = sum(slots) // nodes
    return next(count for count in range(most, -1, -1) if sum(min(count, free) for free in slots) >= count * nodes)
