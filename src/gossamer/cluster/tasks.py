"""Pieces of work on a Ray cluster: each a task of so many CPUs, begun again on another node if its own is lost.

A piece is a callable without arguments that every node can import, and so can be done without a cluster as well. Knows
nothing of what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ClusterError, GossamerError
from .place import Place

TRIES = 4
"""How often a task is begun until a node that runs it is not lost."""
SECONDS_PER_LOOK = 30.0
"""How often the cluster is looked at while nothing ends."""


class Tasks:
    """What one command has its cluster do. Every node must see `files`, and the folder in which the command stands."""

    def __init__(self, ray: Any, cpus: int, *files: Path) -> None:
        """`ray`: as `joined` gives it; `cpus`: of each task. Raises ClusterError if no node has so many."""
        options = {"num_cpus": cpus, "max_retries": TRIES - 1, "scheduling_strategy": "SPREAD"}
        self._ray, self._cpus, self._remote = ray, cpus, ray.remote(**options)(_performed)
        self._place, self._files = Place(), [path.absolute() for path in files]
        self._running: dict[Any, Any] = {}
        self._lost: dict[Any, str] = {}
        self._require_a_node()

    def begin(self, name: Any, work: Callable[[], Any]) -> None:
        """Have a node do a piece as soon as it has room for it."""
        self._running[self._remote.remote(self._place, self._files, work)] = name

    def ended(self) -> Iterator[tuple[Any, Any]]:
        """Name and result of every piece as it ends, those that are begun meanwhile included.

        Raises what a piece raised; ClusterError if the nodes with enough CPUs are gone or one does not see the files,
        and behind all others if the nodes of some pieces were lost again and again.
        """
        while self._running:
            yield from self._look()
        if self._lost:
            first, why = next(iter(self._lost.items()))
            raise ClusterError(
                f"{len(self._lost)} tasks were lost with their nodes, the first of {first}: {why}",
                hint="the same command goes on with them",
            )

    def run(self, works: Iterable[tuple[Any, Callable[[], Any]]]) -> Iterator[tuple[Any, Any]]:
        """The same of named pieces, each asked for only when there is room for it, so that few lie prepared."""
        for name, work in works:
            self.begin(name, work)
            while len(self._running) > self._room():
                yield from self._look()
        yield from self.ended()

    def __len__(self) -> int:
        """How many are begun and have not ended."""
        return len(self._running)

    def _look(self) -> Iterator[tuple[Any, Any]]:
        """Wait for a piece to end, but not for long."""
        ended, _ = self._ray.wait(list(self._running), timeout=SECONDS_PER_LOOK)
        for task in ended:
            name = self._running.pop(task)
            try:
                result = self._ray.get(task)
            except self._ray.exceptions.RayTaskError as error:  # the work raised
                raise error.cause if isinstance(error.cause, GossamerError) else error from None
            except self._ray.exceptions.RayError as error:
                self._lost[name] = str(error).splitlines()[0]
            else:
                yield name, result
        if not ended:
            self._require_a_node()

    def _cpus_of_nodes(self) -> list[float]:
        """Of those that are alive, as the cluster counts them."""
        return [node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]]

    def _room(self) -> int:
        """How many tasks all nodes run at a time."""
        return sum(int(cpus // self._cpus) for cpus in self._cpus_of_nodes())

    def _require_a_node(self) -> None:
        """Raise ClusterError if no node can take a task, which Ray would wait for."""
        most = max(self._cpus_of_nodes(), default=0.0)
        if most < self._cpus:
            raise ClusterError(
                f"each task takes {self._cpus} CPUs, and the largest node of the cluster has {most:g}",
                hint=f"give it fewer threads ({max(1, int(most))}), or add a larger node",
            )


def _performed(place: Place, files: Sequence[Path], work: Callable[[], Any]) -> Any:
    """What a task does, on its node."""
    place.take(*files)
    return work()
