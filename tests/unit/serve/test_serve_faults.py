"""What a server does when its engine dies, hangs or is asked for too much, and when it is told to end itself."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from serving import PATIENCE, Server, chat_body, data_lines, long_body, wait_until

pytestmark = pytest.mark.slow

SLOW = ("--delay", 0.02)


@pytest.fixture(scope="module")
def watched() -> Iterator[Server]:
    with Server(*SLOW, "--silence", 3, "--losses", 10) as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_ends_what_it_did_with_an_error_and_is_replaced(
    watched: Server, number: signal.Signals
) -> None:
    (worker,) = watched.workers()
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(watched.post, "/v1/completions", long_body("0123"))
        events = watched.events("/v1/chat/completions", chat_body("abc", max_tokens=900, ignore_eos=True))
        head = [next(events) for _ in range(3)]
        wait_until(lambda: watched.metrics()["num_requests_running"] == 2, "both running")
        worker.send_signal(number)
        rest = list(events)
        assert all("error" not in json.loads(event) for event in head)
        error = json.loads(rest[-1])["error"]
        assert error["code"] == "engine_lost"
        assert "[DONE]" not in rest
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "engine_lost"
    health = watched.http.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "unavailable", "models": {"fake": "restarting"}}
    refused = watched.chat()
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    wait_until(lambda: watched.http.get("/health").status_code == 200, "another worker")
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert watched.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"


def test_a_server_that_was_stopped_does_not_take_that_for_its_workers_silence(watched: Server) -> None:
    (worker,) = watched.workers()
    watched.process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # longer than the silence that is one too many
    watched.process.send_signal(signal.SIGCONT)
    assert watched.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"
    assert [process.pid for process in watched.workers()] == [worker.pid]


def test_logits_that_are_no_numbers_fail_their_request_alone(watched: Server) -> None:
    with ThreadPoolExecutor() as pool:
        other = pool.submit(watched.post, "/v1/completions", long_body(tokens=100))
        wait_until(lambda: watched.metrics()["num_requests_running"] == 1, "another one running")
        answer = watched.complete("nan:")
        assert answer.status_code == 500
        assert "not finite" in answer.json()["error"]["message"]
        events = list(watched.events("/v1/completions", {"model": "fake", "prompt": "nan:"}))
        assert "not finite" in json.loads(events[-1])["error"]["message"]
        assert other.result().status_code == 200
    wait_until(watched.is_idle, "free blocks")


def test_an_engine_that_breaks_is_replaced(watched: Server) -> None:
    (worker,) = watched.workers()
    answer = watched.complete("boom:")
    assert answer.status_code == 503
    assert "told to break" in answer.json()["error"]["message"]
    wait_until(lambda: watched.http.get("/health").status_code == 200, "another worker")
    assert worker.pid not in [process.pid for process in watched.workers()]


def test_a_grammar_that_costs_too_much_is_refused_while_others_go_on(watched: Server) -> None:
    with ThreadPoolExecutor() as pool:
        other = pool.submit(watched.post, "/v1/completions", long_body(tokens=100))
        wait_until(lambda: watched.metrics()["num_requests_running"] == 1, "another one running")
        answer = watched.complete("abc", guided_regex="((((a{1,50}){1,50}){1,50}){1,50}){1,50}")
        assert answer.status_code == 400
        assert "regex" in answer.json()["error"]["message"]
        assert other.result().status_code == 200
    wait_until(watched.is_idle, "free blocks")


def test_workers_that_fail_again_and_again_end_the_server(tmp_path: Path) -> None:
    with Server("--fail", tmp_path / "fail") as server:
        assert server.complete("abc", max_tokens=1).status_code == 200
        (tmp_path / "fail").touch()
        server.workers()[0].kill()
        assert server.process.wait(PATIENCE) == 1
        assert "there is nothing to load; 3 workers were lost, giving up" in server.said()


def test_workers_end_with_a_server_that_is_killed() -> None:
    with Server(*SLOW, "--names", "one", "two") as server:
        workers = server.workers()
        assert len(workers) == 2
        with server.send("/v1/completions", long_body(model="one")):
            wait_until(lambda: server.metrics()["num_requests_running"], "work for a worker")
            server.process.kill()
            psutil.wait_procs(workers, PATIENCE)
        assert not any(worker.is_running() for worker in workers)


def test_beyond_the_queue_requests_are_refused_before_they_are_tokenized() -> None:
    with Server(*SLOW, "--max-sequences", 4, "--max-queue", 4) as server:
        body = long_body(tokens=150)
        with ThreadPoolExecutor(80) as pool:
            admitted = [pool.submit(server.post, "/v1/completions", body) for _ in range(8)]
            wait_until(lambda: server.metrics()["num_requests_waiting"] == 4, "a full queue")
            refused = list(pool.map(lambda _: server.post("/v1/completions", {**body, "stream": True}), range(72)))
            assert {answer.status_code for answer in refused} == {429}
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
            assert refused[0].json()["error"]["code"] == "queue_full"
            assert server.http.get("/health").status_code == 200
            answers = [answer.result() for answer in admitted]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {150}
        assert server.metrics()["prompt_tokens_total"] == 8 * 3
        assert server.complete(["a"] * 64, max_tokens=1).status_code == 200  # larger than the queue, but alone


def test_more_than_the_cache_holds_is_preempted_and_comes_out_the_same() -> None:
    with Server("--blocks", 24, "--max-sequences", 8) as server, ThreadPoolExecutor(6) as pool:
        one = server.post("/v1/completions", long_body(tokens=200)).json()["choices"]
        answers = list(pool.map(lambda _: server.post("/v1/completions", long_body(tokens=200)).json(), range(6)))
        assert [answer["choices"] for answer in answers] == [one] * 6
        assert server.metrics()["num_preemptions_total"] > 0
        wait_until(server.is_idle, "an idle engine")


def test_sigterm_lets_requests_finish_and_takes_no_new_ones() -> None:
    with Server(*SLOW) as server:
        workers = server.workers()
        body = long_body(tokens=200, stream=True)
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            events = data_lines(response)
            text = json.loads(next(events))["choices"][0]["text"]
            server.terminate()
            wait_until(lambda: server.http.get("/health").status_code == 503, "the drain")
            refused = server.chat()
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == "the server is shutting down"
            rest = list(events)
            assert rest[-1] == "[DONE]"
            text += "".join(json.loads(event)["choices"][0]["text"] for event in rest[:-1])
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert len(text) >= 196  # what is no text are the ends that it was to go over
        assert server.process.wait(PATIENCE) == 0
        assert not any(worker.is_running() for worker in workers)


def test_the_drain_has_an_end() -> None:
    with Server(*SLOW, "--drain-seconds", 0.3) as server:
        workers = server.workers()
        events = server.events("/v1/completions", long_body(tokens=1000))
        next(events)
        server.terminate()
        rest = list(events)
        assert json.loads(rest[-1])["error"]["message"] == "the server is shutting down"
        assert "[DONE]" not in rest
        assert server.process.wait(PATIENCE) == 0
        assert not any(worker.is_running() for worker in workers)
        assert server.said() == ""


def test_a_request_that_takes_too_long_is_ended() -> None:
    with Server(*SLOW, "--request-seconds", 0.5) as server:
        answer = server.post("/v1/completions", long_body())
        assert answer.status_code == 504
        assert "0.5 s" in answer.json()["error"]["message"]
        events = list(server.events("/v1/completions", long_body()))
        assert json.loads(events[-1])["error"]["type"] == "timeout_error"
        assert len(events) > 1
        assert "[DONE]" not in events
        wait_until(server.is_idle, "free blocks")


def test_a_slow_reader_holds_up_nobody() -> None:
    with Server("--request-seconds", 5) as server:
        with server.send("/v1/completions", long_body(tokens=1000, stream=True, logprobs=20)):
            wait_until(lambda: server.metrics()["request_success_total/length"] == 1, "the whole answer made")
            assert server.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"
        wait_until(server.is_idle, "free blocks")
