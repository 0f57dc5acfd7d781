"""Pieces of work on a cluster: how many are begun at a time, and what comes of those that fail. Ray is a double."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gossamer.cluster.tasks import Tasks
from gossamer.errors import ClusterError, CompressionError


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Ray:
    """The calls that Tasks makes, answered in this process: the piece that was begun last ends first."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, *cpus: int) -> None:
        self.cpus = cpus
        self.options: dict[str, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in self.cpus] + [
            {"Alive": False, "Resources": {"CPU": 64.0}}
        ]

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda *arguments: partial(function, *arguments))

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return tasks[-1:], tasks[:-1]

    def get(self, task: Any) -> Any:
        try:
            return task()
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error


def lost() -> None:
    raise RayError("The node died.\nMore of it.")


def refuse() -> None:
    raise CompressionError("not finite", hint="look at it")


def test_pieces_are_asked_for_only_as_nodes_have_room_for_them() -> None:
    asked, ended, most = 0, 0, 0

    def works() -> Iterator[tuple[int, Callable[[], int]]]:
        nonlocal asked, most
        for n in range(9):
            asked += 1
            most = max(most, asked - ended)
            yield n, partial(pow, n, 2)

    ray = Ray(4, 3, 1)  # room for 2, 1 and 0 tasks of 2 CPUs
    found = {}
    for name, result in Tasks(ray, 2).run(works()):
        ended += 1
        found[name] = result
    assert found == {n: n * n for n in range(9)}
    assert most == 4  # those that run, and one that waits
    assert ray.options["num_cpus"] == 2


def test_pieces_that_are_begun_meanwhile_end_too() -> None:
    tasks = Tasks(Ray(1), 1)
    tasks.begin("a", lambda: 1)
    found = []
    for name, result in tasks.ended():
        found.append((name, result))
        if result < 3:
            tasks.begin(f"{name}a", partial(int, result + 1))
    assert found == [("a", 1), ("aa", 2), ("aaa", 3)]
    assert len(tasks) == 0


def test_a_piece_that_is_lost_for_good_is_named_behind_all_others() -> None:
    found = []
    with pytest.raises(ClusterError, match=r"1 tasks were lost .* the first of b: The node died\.") as caught:
        found.extend(Tasks(Ray(1), 1).run([("a", int), ("b", lost), ("c", int)]))
    assert sorted(name for name, _ in found) == ["a", "c"]
    assert "More of it" not in str(caught.value)


def test_what_a_piece_raises_on_purpose_is_raised_as_it_was() -> None:
    with pytest.raises(CompressionError) as caught:
        list(Tasks(Ray(1), 1).run([("a", refuse)]))
    assert (caught.value.message, caught.value.hint) == ("not finite", "look at it")
    with pytest.raises(RayTaskError, match="division"):
        list(Tasks(Ray(1), 1).run([("a", lambda: 1 // 0)]))


def test_a_file_that_a_node_does_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"does not see .*absent"):
        list(Tasks(Ray(1), 1, tmp_path / "absent").run([("a", int)]))


def test_no_node_with_so_many_cpus_is_said_at_once() -> None:
    with pytest.raises(ClusterError, match="each task takes 4 CPUs, and the largest node of the cluster has 3"):
        Tasks(Ray(3, 2), 4)
