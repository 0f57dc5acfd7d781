"""`gossamer bench serve` from the command line to its table, its record and its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from fake_openai import FakeServer, serving
from gossamer.cli import main


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


SHORT = ["--requests", "6", "--concurrency", "2", "--input-tokens", "20:4", "--output-tokens", "4:2"]


def test_a_table_shows_rates_latencies_and_the_protocol(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", fake.url, *SHORT, "--goodput", "ttft:60000", "--shared-prefix", "5"]) == 0
    table = capsys.readouterr().out
    for word in ("output tokens/s", "goodput/s", "(100%)", "TTFT", "TPOT", "ITL", "e2e", "p99"):
        assert word in table
    assert f"{fake.url}, chat, 2 at a time, synthetic prompts behind 5 shared tokens" in table
    assert "the client took" in table


def test_json_is_one_line_with_the_record(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--request-rate", "500", "--endpoint", "completions", "--ignore-eos", "--seed", "4", "--quiet", "--json"]
    assert main(["bench", "serve", f"{fake.url}/v1", "--requests", "5", "--output-tokens", "3", *words]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (line,) = printed.out.splitlines()
    record = json.loads(line)
    assert record["kind"] == "load"
    assert record["protocol"]["request_rate"] == 500
    assert record["protocol"]["concurrency"] is None
    assert record["results"]["completed"] == 5
    assert all(body["ignore_eos"] is True for body in fake.asked[1:])


def test_failures_are_said_with_their_count_and_give_exit_code_1(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.status, fake.every = 429, 3
    assert main(["bench", "serve", fake.url, *SHORT, "--warmup", "0"]) == 1
    printed = capsys.readouterr()
    assert "failed: 2 of 6: HTTP 429: too many requests" in printed.err
    assert "output tokens/s" in printed.out


def test_a_load_of_which_nothing_came_back_still_has_its_table(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.cut_after = 0
    assert main(["bench", "serve", fake.url, *SHORT]) == 1
    printed = capsys.readouterr()
    assert "failed: 6 of 6: stream: cut off" in printed.err
    assert "TTFT" in printed.out


def test_what_the_server_does_not_count_is_said(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.usage = False
    assert main(["bench", "serve", fake.url, *SHORT]) == 0
    table = capsys.readouterr().out
    assert "chunks counted as tokens" in table
    assert "counted as words" in table


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_a_load_with_what_was_measured(fake: FakeServer) -> None:
    fake.delay = 0.01
    words = ["bench", "serve", fake.url, "--requests", "5000", "--input-tokens", "5", "--output-tokens", "3", "--json"]
    command = [sys.executable, "-m", "gossamer", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Shells start background jobs with SIGINT ignored, and children inherit that.
    with subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        while len(fake.asked) < 20 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    results = json.loads(out)["results"]
    assert process.returncode == 130
    assert results["interrupted"]
    assert results["failed"] == 0
    assert 0 < results["completed"] <= len(fake.asked)
    assert results["completed"] + results["unfinished"] == 5000
    assert "interrupted: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "URL"),
        (["ftp://x"], "no address"),
        (["http://h", "--concurrency", "2", "--request-rate", "1"], "two ways"),
        (["http://h", "--prompts", "x.txt", "--input-tokens", "5"], "--prompts has its own"),
        (["http://h", "--input-tokens", "5:9"], "5:9"),
        (["http://h", "--goodput", "ttf:9"], "did you mean 'ttft'"),
        (["http://h", "--requests", "0"], "requests is 0"),
        (["http://h", "--endpoint", "embeddings"], "embeddings"),
        (["http://h", "--concurency", "2"], "did you mean '--concurrency'"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_of_two_words_has_its_own_help_and_bench_keeps_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--help"]) == 0
    own = capsys.readouterr().out
    assert "gossamer bench serve [OPTIONS] {URL}" in own
    assert "--request-rate" in own
    assert main(["bench", "--help"]) == 0
    other = capsys.readouterr().out
    assert "--repetitions" in other
    assert "--request-rate" not in other
