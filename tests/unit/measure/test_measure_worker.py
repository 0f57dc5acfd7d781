"""A worker answers, and whatever ends it becomes an error that says what happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gossamer.measure.worker import Job, Worker, WorkerDiedError, WorkerError, run_job

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _jobs_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_a_job_returns_its_value_and_reports_on_the_way() -> None:
    seen: list[tuple[str, int, int]] = []
    with Worker(Job("worker_jobs:add", {"a": 2, "b": 3}), lambda *event: seen.append(event)) as worker:
        assert list(worker) == [5]
        assert worker.facts == {"first": 2}
    assert seen == [("adding", 1, 1)]


def test_a_job_that_yields_goes_on_only_when_asked() -> None:
    with Worker(Job("worker_jobs:count", {"end": 3})) as worker:
        assert next(worker) == 0
        assert worker.facts == {"begun": 0}
        assert list(worker) == [1, 2]


def test_a_job_runs_in_another_process_with_the_threads_it_was_given() -> None:
    found = run_job(Job("worker_jobs:environment", threads=3))
    assert found["pid"] != os.getpid()
    assert found["threads"] == "3"


def test_what_libraries_print_does_not_mix_with_answers() -> None:
    assert run_job(Job("worker_jobs:chatter")) == "heard"


def test_a_typed_error_arrives_with_kind_message_and_hint() -> None:
    with pytest.raises(WorkerError) as caught:
        run_job(Job("worker_jobs:refuse"))
    assert (caught.value.kind, caught.value.message) == ("DoesNotFit", "needs 8 GB, there are 2")
    assert caught.value.hint == "take a smaller one"


def test_any_other_exception_names_the_line_that_raised_it() -> None:
    with Worker(Job("worker_jobs:stumble")) as worker:
        with pytest.raises(WorkerError, match=r"by nothing \(worker_jobs\.py:\d+\)") as caught:
            next(worker)
        assert worker.facts == {"model": {"name": "m"}}
    assert caught.value.kind == "ZeroDivisionError"


@pytest.mark.parametrize(("debug", "shown"), [("1", True), ("0", False)])
def test_the_traceback_of_a_worker_is_shown_to_who_asks_for_it(
    debug: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOSSAMER_DEBUG", debug)
    with pytest.raises(WorkerError):
        run_job(Job("worker_jobs:refuse"))
    said = capsys.readouterr().err
    assert ("Traceback" in said and "DoesNotFit" in said) is shown


def test_a_job_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(WorkerError, match="no_such_job"):
        run_job(Job("worker_jobs:no_such_job"))


def test_a_killed_worker_is_named_by_its_signal_and_keeps_its_facts_and_last_words() -> None:
    with Worker(Job("worker_jobs:kill_itself")) as worker:
        with pytest.raises(WorkerDiedError, match=r"SIGKILL.*the end is near"):
            next(worker)
        assert worker.facts == {"model": {"name": "m"}}


def test_a_worker_that_leaves_without_an_answer_is_an_error() -> None:
    with pytest.raises(WorkerDiedError, match="exit code 7"):
        run_job(Job("worker_jobs:leave"))


def test_an_answer_that_is_not_json_is_an_error() -> None:
    with pytest.raises(WorkerError):
        run_job(Job("worker_jobs:not_json"))


def test_an_interrupt_in_the_parent_ends_the_child() -> None:
    pids = []

    def interrupted() -> None:
        with Worker(Job("worker_jobs:sleep")) as worker:
            pids.append(worker.pid)
            assert alive(worker.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert wait_until_gone(pids[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_worker_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = f"import worker_jobs; worker_jobs.spawn_and_sleep({str(pid_file)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", command], env=environment)
    try:
        while not pid_file.exists():
            assert parent.poll() is None
            time.sleep(0.02)
        pid = int(pid_file.read_text())
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until_gone(pid)
