"""Models on two hosts: the same text as from one process, over a slow link too; and what follows when it is cut."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import nodes_engine
from gossamer.engine import LLM
from gossamer.engine.sharded.nodes import Nodes
from gossamer.formats import Integer
from parallel_models import write_model
from two_hosts import ADDRESSES, slow_hosts, veth_hosts

ENGINE = Path(nodes_engine.__file__)
DELAY = 0.005
CLIENT = """
import http.client, json, sys
server = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=240)
body = {"model": "model", "prompt": "hello you", "max_tokens": int(sys.argv[2]), "temperature": 0, "stream": True}
server.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}), {"content-type": "application/json"})
for line in server.getresponse():
    print(line.decode(), end="", flush=True)
"""
SECONDS = 240

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    changes = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 4}
    return write_model(tmp_path_factory.mktemp("nodes") / "model", Integer(4, 16), **changes)


@pytest.fixture(scope="module")
def expected(folder):
    return [list(tokens) for tokens in answers(LLM(folder))]


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("GOSSAMER_JOIN_TOKEN", "only for these tests")


def answers(llm):
    return [completion.tokens for completion in llm.generate(nodes_engine.PROMPTS, nodes_engine.GREEDY)]


def started(command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def joining(address):
    return [sys.executable, "-m", "gossamer", "join", address]


def below(process):
    """The processes that this one has started."""
    return psutil.Process(process.pid).children(recursive=True)


def test_ranks_that_join_write_what_one_process_does_and_end_with_the_engine(folder, expected):
    """Two stages, of which the second is another node's; the prompts are enough for micro-batches."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with started(joining(address)) as node:
        llm = LLM(folder, tp=1, pp=2, nodes=Nodes.at(2, address))
        assert [list(tokens) for tokens in answers(llm)] == expected
        assert len(llm.backend.pids) == 1
        ranks = below(node)
        assert len(ranks) == 1
        llm.backend.close()
        _, said = node.communicate(timeout=SECONDS)
    assert node.returncode == 0, said
    assert not psutil.wait_procs(ranks, timeout=SECONDS)[1]


def test_two_hosts_agree_with_one_process_over_a_slow_link_and_a_cut_ends_both(folder, expected):
    with slow_hosts() as hosts:
        engine = started(hosts.command(0, sys.executable, str(ENGINE), str(folder), ADDRESSES[0]))
        node = started(hosts.command(1, *joining(ADDRESSES[0])))

        def ask(what):
            engine.stdin.write(what + "\n")
            engine.stdin.flush()
            return heard()

        def heard():
            return json.loads(engine.stdout.readline())

        with engine, node:
            try:
                assert "2 ranks by 1 stages on 2 nodes" in heard()
                assert ask("tokens") == expected
                near = ask("time")
                hosts.delay = DELAY
                assert ask("tokens") == expected
                far = ask("time")
                print(f"{1e3 * near:.1f} ms per token; {1e3 * far:.1f} ms with {1e3 * DELAY:g} ms for each packet")
                processes = [*below(engine), *below(node)]
                assert len(processes) == 2
                assert ask("stream") == "began"
                hosts.set_link(1, "down")
                assert "rank 1 of 2 on 10.77.0.2 has been silent" in heard()
                _, said = node.communicate(timeout=SECONDS)
                assert node.returncode == 1
                assert "rank 1 has ended" in said
                assert not psutil.wait_procs(processes, timeout=SECONDS)[1]
                engine.communicate(timeout=SECONDS)
                assert engine.returncode == 0
            finally:
                engine.kill()
                node.kill()


def test_a_server_whose_node_is_cut_off_tells_its_client_and_serves_again_when_another_joins(tmp_path):
    changes = {"num_hidden_layers": 2, "max_position_embeddings": 4096}
    folder = write_model(tmp_path / "model", Integer(4, 16), **changes)
    with veth_hosts() as hosts:
        options = ["--port", "0", "--tp", "2", "--nodes", "2", "--master-addr", ADDRESSES[0], "--kv-memory", "20MB"]
        server = started(hosts.command(0, sys.executable, "-m", "gossamer", "serve", str(folder), *options))
        nodes = [started(hosts.command(1, *joining(ADDRESSES[0])))]
        with server, nodes[0]:
            try:
                port = server.stdout.readline().strip().rsplit(":", 1)[1]
                before = completed(hosts, port, 8)
                assert before[-1] == "[DONE]"
                with client(hosts, port, 4000) as asking:
                    assert "text" in asking.stdout.readline()
                    hosts.set_link(0, "down")
                    rest, _ = asking.communicate(timeout=SECONDS)
                assert "rank 1 of 2 on 10.77.0.2 has been silent" in rest
                nodes[0].communicate(timeout=SECONDS)
                assert nodes[0].returncode == 1
                hosts.set_link(0, "up")
                nodes.append(started(hosts.command(1, *joining(ADDRESSES[0]))))
                with nodes[1]:
                    while (after := completed(hosts, port, 8))[-1] != "[DONE]":
                        time.sleep(0.5)
                    assert texts(after) == texts(before)
                    server.terminate()
                    nodes[1].communicate(timeout=SECONDS)
                    assert nodes[1].returncode == 0
            finally:
                for process in (server, *nodes):
                    process.kill()


def client(hosts, port, tokens):
    return started(hosts.command(0, sys.executable, "-c", CLIENT, port, str(tokens)))


def completed(hosts, port, tokens):
    """What a client is sent: JSON texts, and [DONE] at the end of those that are whole."""
    with client(hosts, port, tokens) as asking:
        said, _ = asking.communicate(timeout=SECONDS)
    return [line.removeprefix("data: ") for line in said.splitlines() if line] or [""]


def texts(events):
    return [choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"]]
