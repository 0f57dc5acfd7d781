"""Replicas on a cluster of four nodes behind one address: whole answers, one home for each beginning, a node killed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import PATIENCE, Server, data_lines, long_body, wait_until

from ray_cluster import busy_nodes, cluster_of

pytest.importorskip("ray", reason="needs Ray")
pytest.importorskip("ray.serve", reason="needs Ray Serve")

HERE = Path(__file__).parent
WORKER = "gossamer.serve.worker"
CLIENTS = 50
TOKENS = 100


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
        with cluster_of(4) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def server(cluster: Any) -> Iterator[Server]:
    command = (sys.executable, str(HERE / "fake_replicas.py"))
    with Server(cluster.address, 2, 0.02, command=command) as server:
        yield server


def test_replicas_answer_as_one_server(server: Server, cluster: Any) -> None:
    assert len(busy_nodes(cluster, WORKER)) == 2
    assert server.complete("abc", max_tokens=4).json()["choices"][0]["text"] == "defg"
    lines = list(server.events("/v1/completions", long_body("abc", 4)))
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == "defg"
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "fake"
    assert server.http.get("/health").json()["status"] == "ok"
    assert server.complete("abc", model="other").status_code == 404
    assert server.complete("abc", max_tokens=-1).status_code == 400


def test_prompts_that_begin_alike_find_their_beginning_in_the_cache(server: Server) -> None:
    prompts = [f"{number:02d}" + "abcdefgh" * 8 for number in range(10)]
    for prompt in prompts:
        server.complete(prompt, max_tokens=1)
    again = [server.complete(prompt, max_tokens=1).json()["usage"] for prompt in prompts]
    assert all(usage["prompt_tokens_details"]["cached_tokens"] >= 48 for usage in again)


@pytest.mark.slow
def test_of_fifty_clients_a_killed_node_breaks_off_streams_only(
    server: Server, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = server.complete("abc", max_tokens=TOKENS, ignore_eos=True).json()["choices"][0]["text"]
    over = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as clients:
        ends = [clients.submit(_ask_until, over, server.url, number, whole) for number in range(CLIENTS)]
        try:
            time.sleep(2.0)
            homes = busy_nodes(cluster, WORKER)
            began = time.monotonic()
            cluster.remove_node(homes[0], allow_graceful=False)
            wait_until(lambda: len(busy_nodes(cluster, WORKER)) == 2, "another replica")
            wait_until(lambda: server.http.get("/health").status_code == 200, "health")
            seconds = time.monotonic() - began
        finally:
            over.set()
        outcomes = [outcome for end in ends for outcome in end.result()]
    with capsys.disabled():
        counts = {name: outcomes.count(name) for name in sorted(set(outcomes))}
        print(f"\n{len(outcomes)} requests of {CLIENTS} clients: {counts}; another replica after {seconds:.1f} s")
    assert set(outcomes) <= {"answer", "stream", "broken stream"}
    assert outcomes.count("broken stream") <= CLIENTS
    assert outcomes.count("answer") >= CLIENTS // 2
    assert server.complete("abc", max_tokens=4).json()["choices"][0]["text"] == "defg"


def _ask_until(over: threading.Event, url: str, number: int, whole: str) -> list[str]:
    """One client: the same request again and again, every other client in streams."""
    found = []
    with httpx2.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
        while not over.is_set():
            found.append(_streamed(http, whole) if number % 2 else _answered(http, whole))
    return found


def _answered(http: httpx2.Client, whole: str) -> str:
    response = http.post("/v1/completions", json=long_body("abc", TOKENS))
    if response.status_code != 200:
        return f"{response.status_code}: {response.text}"
    return "answer" if response.json()["choices"][0]["text"] == whole else f"wrong: {response.text}"


def _streamed(http: httpx2.Client, whole: str) -> str:
    text = ""
    with http.stream("POST", "/v1/completions", json=long_body("abc", TOKENS, stream=True)) as response:
        if response.status_code != 200:
            return f"{response.status_code}: {response.read().decode()}"
        for line in data_lines(response):
            if line == "[DONE]":
                return "stream" if text == whole else f"wrong: {text}"
            event = json.loads(line)
            if "error" in event:
                lost = event["error"]["code"] == "engine_lost" and whole.startswith(text) and text
                return "broken stream" if lost else f"wrong: {event}"
            text += event["choices"][0]["text"]
    return "a stream without an end"
