"""Replicas whose model two nodes hold together, on a cluster: a node killed that holds ranks, another in its place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gossamer.cli import main
from ray_cluster import NODE, PATIENCE, busy_nodes, cluster_of, wait_until
from tiny_llama import make_folder

pytest.importorskip("ray", reason="needs Ray")
pytest.importorskip("ray.serve", reason="needs Ray Serve")

ENGINE, RANK = "gossamer.serve.worker", "gossamer.engine.sharded.rank"
NODES = 5
ASKED = {"model": "tiny", "prompt": [5, 9, 3, 17], "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(NODES) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("group") / "tiny")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[str]:
    """What one process answers."""
    with served([str(folder)]) as http:
        yield answer(http)


@contextmanager
def served(arguments: list[str]) -> Iterator[httpx2.Client]:
    """A client of `gossamer serve` with these arguments, while it runs."""
    command = [sys.executable, "-m", "gossamer", "serve", *arguments, "--port", "0", "--kv-memory", "8MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().rpartition(" ")[2].strip()
            assert url.startswith("http")
            with httpx2.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
                yield http
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def answer(http: httpx2.Client) -> str:
    response = http.post("/v1/completions", json=ASKED)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def holders(cluster: Any) -> list[Any]:
    """Nodes that hold ranks for an engine on another one."""
    engines = busy_nodes(cluster, ENGINE)
    return [node for node in busy_nodes(cluster, RANK) if node not in engines]


@pytest.mark.slow
def test_each_replica_is_on_nodes_of_its_own_and_gets_another_for_one_that_is_lost(
    cluster: Any, folder: Path, whole: str
) -> None:
    ray = ["--ray", cluster.address, "--replicas", "2", "--tp", "2", "--nodes", "2"]
    with served([str(folder), *ray]) as http:
        assert len(busy_nodes(cluster, ENGINE)) == 2
        assert len(holders(cluster)) == 2
        assert answer(http) == whole
        lost = holders(cluster)[0]
        cluster.remove_node(lost, allow_graceful=False)
        assert answer(http) == whole  # by the other replica, or this one's next engine
        wait_until(lambda: len(holders(cluster)) == 2, "ranks on the node that was free")
        lost = busy_nodes(cluster, ENGINE)[0]
        cluster.add_node(**NODE)
        cluster.remove_node(lost, allow_graceful=False)
        wait_until(lambda: len(busy_nodes(cluster, ENGINE)) == 2 and len(holders(cluster)) == 2, "another replica")
        assert answer(http) == whole
    wait_until(lambda: not busy_nodes(cluster, RANK), "the end of all ranks")


def test_too_few_nodes_are_counted_before_anything_is_started(
    cluster: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = ["--ray", cluster.address, "--replicas", "2", "--tp", "4", "--nodes", "4"]
    assert main(["serve", str(folder), *ray, "--port", "0"]) == 1
    assert "there is room for 1" in capsys.readouterr().err
