"""Who may bring ranks to an engine on another machine, and which model they may hold a part of."""

from __future__ import annotations

import json
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.checkpoint import open_checkpoint
from gossamer.cli import main
from gossamer.engine.sharded.identity import identity, require_same
from gossamer.engine.sharded.join import join
from gossamer.engine.sharded.nodes import PORT, Door, Nodes, host_and_port, interface, knock, prove
from gossamer.engine.sharded.rank import load
from gossamer.errors import EngineError, UsageError
from gossamer.formats import Integer
from gossamer.parallel.wire import Message, Wire
from parallel_models import write_model

TOKEN = "only for these tests"
SECONDS = 60.0


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("GOSSAMER_JOIN_TOKEN", TOKEN)


@contextmanager
def admitting(nodes=2, ranks=4, tp=2):
    """A door that lets in ranks while this lasts, and a future that ends when all are there."""
    with Door(Nodes(nodes, "127.0.0.1", 0), ranks, tp, 10.0) as door, ThreadPoolExecutor(1) as pool:
        yield door, pool.submit(door.admit, SECONDS)
        for wire, _ in door.admitted.values():
            wire.close()


def bring(door, values, token=TOKEN):
    """A node's first words to a door."""
    return knock(door.address, token.encode(), values)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.0.0.1", ("10.0.0.1", PORT)), ("head.local:80", ("head.local", 80)), ("10.0.0.1:0", ("10.0.0.1", 0))],
)
def test_an_address_is_a_host_and_perhaps_a_port(address, expected):
    assert host_and_port(address) == expected


@pytest.mark.parametrize(
    "address", ["", ":80", "host:port", "host:99999", "a/b", "me@host", "tcp://host", "a?b", "a#b"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UsageError, match="HOST"):
        host_and_port(address)


def test_ranks_of_other_nodes_come_in_when_they_prove_the_token():
    with admitting() as (door, done):
        with bring(door, {}) as end:
            given = Wire(end).receive()
        assert given.kind == "place"
        assert dict(given.values) == {"first": 2, "ranks": 2, "tp": 2, "silence": 10.0}
        ends = [bring(door, {"rank": rank}) for rank in (3, 2)]
        done.result(SECONDS)
        assert sorted(door.admitted) == [2, 3]
        wire, peer = door.admitted[3]
        wire.send(Message("beat"))
        assert Wire(ends[0]).receive().kind == "beat"
        assert peer == "127.0.0.1"
        for end in ends:
            end.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 2}, "rank 2 is not wanted"),  # it is the engine's own, or has no place yet
        ({"rank": "2"}, "makes no sense"),
        ({"version": "0.0.0"}, "the engine is gossamer"),
    ],
)
def test_who_says_what_does_not_fit_is_told_so_and_does_not_keep_others_out(values, message):
    with admitting(ranks=2, tp=1) as (door, done):
        with bring(door, values) as end:
            assert message in Wire(end).receive().values["message"]
        with bring(door, {}), bring(door, {"rank": 1}):
            done.result(SECONDS)


def test_more_nodes_than_were_asked_for_are_refused():
    with admitting(ranks=2) as (door, done):
        with bring(door, {}) as end:
            assert Wire(end).receive().kind == "place"
        with pytest.raises(EngineError, match="all 2 nodes have joined already"):
            join(door.address, 0.0)
        with bring(door, {"rank": 1}):
            done.result(SECONDS)


def test_another_token_is_refused_on_both_sides_and_lets_nothing_be_said(caplog):
    with admitting(ranks=2) as (door, done):
        with pytest.raises(EngineError, match="does not know the same token") as refused:
            bring(door, {}, token="another one of these")
        assert "GOSSAMER_JOIN_TOKEN" in refused.value.hint
        with bring(door, {}), bring(door, {"rank": 1}):
            done.result(SECONDS)
    assert "127.0.0.1 was turned away: the other side does not know the same token" in caplog.text


@given(said=st.binary(max_size=200))
def test_whoever_does_not_know_the_token_gets_no_further(said):
    """An engine that is told anything at all; the end of it comes where the stranger says no more."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(SECONDS)
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((EngineError, EOFError)):
            prove(ours, TOKEN.encode(), "engine")
        ours.shutdown(socket.SHUT_WR)
        assert len(theirs.recv(1000)) == 32  # random bytes, and no proof of its own
        assert theirs.recv(1000) == b""


def test_a_proof_cannot_be_sent_back_or_used_again():
    """Whoever repeats what the engine, or a node, has sent knows nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        node = pool.submit(prove, ours, TOKEN.encode(), "node")
        nonce = theirs.recv(32)
        theirs.sendall(nonce)
        theirs.sendall(theirs.recv(32))
        with pytest.raises(EngineError, match="token"):
            node.result(SECONDS)
    heard = []
    for _ in range(2):
        ours, theirs = socket.socketpair()
        with ours, theirs, ThreadPoolExecutor(1) as pool:
            engine = pool.submit(prove, ours, TOKEN.encode(), "engine")
            if not heard:
                recording = Recorder(theirs)
                prove(recording, TOKEN.encode(), "node")
                engine.result(SECONDS)
                heard = recording.sent
                continue
            for said in heard:
                theirs.sendall(said)
            with pytest.raises(EngineError, match="token"):
                engine.result(SECONDS)


class Recorder:
    """An end of a connection that remembers what was sent."""

    def __init__(self, end):
        self.end, self.sent = end, []

    def sendall(self, data):
        self.sent.append(data)
        self.end.sendall(data)

    def recv(self, count):
        return self.end.recv(count)


def test_a_stranger_who_says_nothing_is_turned_away_in_time(monkeypatch):
    monkeypatch.setattr("gossamer.engine.sharded.nodes.SECONDS_TO_PROVE", 1.0)
    with (
        admitting(ranks=2) as (door, done),
        socket.create_connection(door.address),
        bring(door, {}),
        bring(door, {"rank": 1}),
    ):
        done.result(SECONDS)


def test_an_engine_waits_only_so_long_and_says_how_to_join():
    with Door(Nodes(2, "127.0.0.1", 0), 2, 2, 10.0) as door:
        with pytest.raises(EngineError, match="0 of 1 ranks of other nodes have joined in 0 s") as late:
            door.admit(0.0)
        assert late.value.hint.startswith(f"gossamer join 127.0.0.1:{door.address[1]}")


def test_an_address_that_is_not_ours_or_taken_is_refused():
    with pytest.raises(UsageError, match="no network interface"):
        interface("0.0.0.0")
    with Door(Nodes(2, "127.0.0.1", 0), 2, 2, 10.0) as door:
        taken = Nodes(2, *door.address)
        with pytest.raises(EngineError, match="cannot listen"):
            Door(taken, 2, 2, 10.0)
    with pytest.raises(UsageError, match="3 ranks on 2 nodes"):
        Door(Nodes(2, "127.0.0.1", 0), 3, 3, 10.0)


def test_nobody_joins_where_there_is_no_engine_or_no_token(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(EngineError, match="no engine takes in nodes at 127"):
        join(address, 0.0)
    monkeypatch.setenv("GOSSAMER_JOIN_TOKEN", "short")
    assert main(["join", "127.0.0.1"]) == 2
    assert "GOSSAMER_JOIN_TOKEN is not set to 16 characters or more" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--nodes", "2"], ["--master-addr", "127.0.0.1"]])
def test_nodes_and_their_address_belong_together(options, capsys):
    assert main(["run", "nowhere", "Hi", "--tp", "2", *options]) == 2
    assert "--nodes and --master-addr belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["second", "--tp", "2", "--master-addr", "127.0.0.1"], "--nodes are for one model"),
        (["--tp", "2", "--master-addr", "127.0.0.1", "--ray"], "--ray finds the other nodes itself"),
        (["--tp", "3", "--ray"], "3 ranks on 2 nodes"),
    ],
)
def test_what_a_server_on_several_nodes_is_not_given(more, why, capsys):
    assert main(["serve", "nowhere", *more, "--nodes", "2"]) == 2
    assert why in capsys.readouterr().err


def test_a_rank_refuses_a_model_that_is_not_the_engines(tmp_path):
    here = write_model(tmp_path / "here", Integer(4, 16))
    model = open_checkpoint(here)
    require_same(model, json.loads(json.dumps(identity(model))))
    wider = open_checkpoint(write_model(tmp_path / "wider", Integer(4, 16), intermediate_size=256))
    coarser = open_checkpoint(write_model(tmp_path / "coarser", Integer(4, 32)))
    for other, what in ((wider, "config"), (coarser, "shapes and formats")):
        with pytest.raises(EngineError, match=rf"here is another model here than at the engine: {what} differ"):
            require_same(model, identity(other))
    for what in ("norms and biases", "gossamer.json"):
        with pytest.raises(EngineError, match=f"{what} differ"):
            require_same(model, identity(model) | {what: secrets.token_hex(32)})
    spec = {"rank": 1, "tp": 2, "pp": 1, "neighbours": 1, "timeout": 1.0, "model": str(here)}
    with pytest.raises(EngineError, match="another model"):
        load(Message("load", spec | {"identity": identity(wider)}), None)
