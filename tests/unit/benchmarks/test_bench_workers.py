"""Children of the CPU benchmark: they answer in turn, stand still between turns, and their ends are told apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cpu_sides
import worker_loop
from cpu_sides import Failed, Worker
from worker_loop import Request

REQUEST = Request("decode", batch=2, prompt=3, output=5, depth=10)
SCRIPT = f"""
import sys
sys.path.append({str(Path(worker_loop.__file__).parent)!r})
from worker_loop import serve
def seconds_of(request):
    print("not an answer")
    if request.batch > 2:
        raise ValueError("too many")
    if request.batch == 0:
        sys.exit("gave up")
    return 2.0
serve(lambda: (seconds_of, {{"version": "1"}}))
"""


@pytest.fixture
def worker() -> Iterator[Worker]:
    child = Worker("test", [sys.executable, "-c", SCRIPT], {})
    yield child
    child.close()


def state(worker: Worker) -> str:
    """The process's state as the system names it: T is stopped."""
    return Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_worker_answers_in_tokens_per_second_whatever_libraries_print(worker: Worker) -> None:
    assert worker.facts["version"] == "1"
    assert worker.sample(REQUEST) == pytest.approx(2 * 5 / 2.0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_stands_still_between_its_turns(worker: Worker) -> None:
    for _ in range(2):
        deadline = time.monotonic() + 10
        while state(worker) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state(worker) == "T"
        worker.sample(REQUEST)


def test_a_request_that_fails_leaves_the_worker_usable(worker: Worker) -> None:
    with pytest.raises(Failed, match="ValueError: too many"):
        worker.sample(Request("decode", 3, 1, 1, 0))
    assert worker.sample(REQUEST) > 0


def test_a_worker_that_ends_is_failed_with_its_last_words(worker: Worker) -> None:
    with pytest.raises(Failed, match="gave up"):
        worker.sample(Request("decode", 0, 1, 1, 0))


def test_a_worker_that_never_answers_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sides, "LOAD_SECONDS", 0.2)
    with pytest.raises(Failed, match="no answer"):
        Worker("silent", [sys.executable, "-c", "import time; time.sleep(60)"], {})


def test_what_this_process_and_its_children_compute_is_not_foreign() -> None:
    before = cpu_sides._own_seconds()
    with cpu_sides.competitor(True):
        time.sleep(0.5)
        assert cpu_sides._own_seconds() > before + 0.05
    ended = cpu_sides._own_seconds()
    assert ended > before + 0.05


def test_prompts_have_the_asked_shape_and_never_repeat() -> None:
    first, second = worker_loop.prompts(REQUEST, 100), worker_loop.prompts(REQUEST, 100)
    assert [len(ids) for ids in first] == [13, 13]
    assert first != second
    assert first[0] != first[1]


def test_a_request_counts_the_tokens_that_are_timed() -> None:
    assert REQUEST.tokens == 10
    assert Request("prefill", 2, 512, 0, 0).tokens == 1024
