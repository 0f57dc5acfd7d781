"""A client that goes away takes its request with it, wherever that is."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from serving import Server, long_body, wait_until

PROMPT = "x" * 800
"""50 steps of 16 tokens, with 10 ms for each token."""


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    with Server("--max-sequences", 1, "--max-batch-tokens", 16, "--token-delay", 0.01) as server:
        yield server


@pytest.fixture(autouse=True)
def _idle_before_and_after(slow: Server) -> Iterator[None]:
    assert slow.is_idle()
    yield
    wait_until(slow.is_idle, "an idle engine")


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_decodes(slow: Server, stream: bool) -> None:
    before = slow.metrics()
    with slow.send("/v1/completions", long_body(stream=stream)):
        wait_until(lambda: slow.metrics()["generation_tokens_total"] > before["generation_tokens_total"], "a token")
        assert slow.metrics()["kv_cache_usage_perc"] > 0
    wait_until(slow.is_idle, "free blocks")
    after = slow.metrics()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 900
    assert after["request_success_total/abort"] == before["request_success_total/abort"] + 1


@pytest.mark.parametrize("stream", [False, True])
def test_while_its_prompt_is_read(slow: Server, stream: bool) -> None:
    before = slow.metrics()
    with slow.send("/v1/completions", long_body(("s" if stream else "n") + PROMPT, 100, stream=stream)):
        wait_until(lambda: slow.metrics()["kv_cache_usage_perc"], "the prompt in the cache")
    wait_until(slow.is_idle, "free blocks")
    after = slow.metrics()
    assert after["prompt_tokens_total"] > before["prompt_tokens_total"]
    assert after["generation_tokens_total"] == before["generation_tokens_total"]


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits(slow: Server, stream: bool) -> None:
    with slow.send("/v1/completions", long_body(stream=True)):
        wait_until(lambda: slow.metrics()["num_requests_running"] == 1, "one that runs")
        with slow.send("/v1/completions", long_body("0123", stream=stream)):
            wait_until(lambda: slow.metrics()["num_requests_waiting"] == 1, "one that waits")
        wait_until(lambda: slow.metrics()["num_requests_waiting"] == 0, "an empty queue")
        assert slow.metrics()["num_requests_running"] == 1


def test_with_several_prompts_and_choices(slow: Server) -> None:
    before = slow.metrics()
    with slow.send("/v1/completions", {**long_body(), "prompt": ["abc", "0123"], "n": 2}):
        wait_until(lambda: slow.metrics()["num_requests_waiting"] == 3, "three that wait")
    wait_until(slow.is_idle, "free blocks")
    assert slow.metrics()["request_success_total/abort"] == before["request_success_total/abort"] + 4


def test_nothing_is_left_of_them_in_the_server(slow: Server) -> None:
    def come_and_go() -> None:
        sent = [slow.send("/v1/completions", long_body(stream=bool(i % 2))) for i in range(40)]
        wait_until(lambda: slow.metrics()["num_requests_waiting"] == 39, "all of them")
        for sock in sent:
            sock.close()
        wait_until(slow.is_idle, "an idle engine")

    come_and_go()
    process = psutil.Process(slow.process.pid)
    open_files, threads = process.num_fds(), process.num_threads()
    for _ in range(3):
        come_and_go()
    wait_until(lambda: process.num_fds() <= open_files, "closed sockets")
    assert process.num_threads() <= threads


def test_places_in_the_queue_are_given_back(slow: Server) -> None:
    for _ in range(3):
        sent = [slow.send("/v1/completions", long_body(stream=True)) for _ in range(60)]
        wait_until(lambda: slow.metrics()["num_requests_waiting"] == 59, "a full queue")
        for sock in sent:
            sock.close()
        wait_until(slow.is_idle, "an idle engine")
    assert slow.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"
