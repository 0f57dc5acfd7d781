"""What ranks say arrives as it was; what nobody of ours has said is refused, and claims no memory."""

from __future__ import annotations

import contextlib
import json
import socket
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import EngineError
from gossamer.parallel.wire import KINDS, Message, Wire, frame, parsed


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    with ours, theirs:
        yield ours, Wire(theirs)


def test_a_message_arrives_as_it_was_sent(ends):
    ours, theirs = ends
    arrays = (np.arange(6, dtype=np.int32).reshape(2, 3), np.array([0.5, np.nan], np.float32), np.zeros(0, np.int64))
    Wire(ours).send(Message("step", {"verb": "argmax", "n": 3, "nothing": None}, arrays))
    found = theirs.receive()
    assert (found.kind, found.values) == ("step", {"verb": "argmax", "n": 3, "nothing": None})
    for expected, array in zip(arrays, found.arrays, strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def header(kind="done", values=None, arrays=()):
    return json.dumps({"kind": kind, "values": values or {}, "arrays": list(arrays)}).encode()


@pytest.mark.parametrize(
    ("said", "body"),
    [
        pytest.param(b"\x80\x04cos\nsystem\n", b"", id="pickle"),
        pytest.param(b"[" * 60000, b"", id="depth"),
        pytest.param(b"[]", b"", id="no object"),
        pytest.param(b'{"kind": "done"}', b"", id="keys missing"),
        pytest.param(header("exec"), b"", id="unknown kind"),
        pytest.param(header(["done"]), b"", id="kind is a list"),
        pytest.param(header(arrays=[["object", [1]]]), b"12345678", id="objects"),
        pytest.param(header(arrays=[["float32", [-1]]]), b"", id="negative"),
        pytest.param(header(arrays=[["float32", [1 << 40, 1 << 40]]]), b"", id="huge"),
        pytest.param(header(arrays=[["float32", [2]]]), b"1234", id="too short"),
        pytest.param(header(arrays=[["float32", [1]]]), b"12345678", id="left over"),
        pytest.param(header(arrays=[["float32", [True]]]), b"1234", id="a bool as a size"),
        pytest.param(header(arrays=[["float32", [1, 1, 1]]]), b"1234", id="three axes"),
        pytest.param(header(arrays=["float32"]), b"", id="no shape"),
    ],
)
def test_nonsense_is_refused(ends, said, body):
    ours, theirs = ends
    ours.sendall(struct.pack(">II", len(said), len(body)) + said + body)
    with pytest.raises(EngineError, match="makes no sense"):
        theirs.receive()


def test_a_claim_of_gigabytes_is_refused_before_anything_is_read(ends):
    ours, theirs = ends
    ours.sendall(struct.pack(">II", 10, (1 << 32) - 1))
    with pytest.raises(EngineError, match="claims"):
        theirs.receive()


def test_the_end_in_the_middle_of_a_message_is_an_end(ends):
    ours, theirs = ends
    ours.sendall(frame(Message("done", {"a": 1}))[:-3])
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()


@given(st.binary(max_size=200), st.binary(max_size=64))
def test_random_bytes_are_a_message_or_an_engine_error(said, body):
    with contextlib.suppress(EngineError):
        assert parsed(said, body).kind in KINDS


KIND = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3))
SHAPES = st.recursive(st.sampled_from(["int32", "float32", -1, 4, True]), lambda x: st.lists(x, max_size=3))


@given(KIND, SHAPES)
def test_random_headers_are_a_message_or_an_engine_error(kind, arrays):
    said = json.dumps({"kind": kind, "values": {}, "arrays": arrays}).encode()
    with contextlib.suppress(EngineError):
        assert parsed(said, b"12345678").kind in KINDS


def test_a_value_of_another_type_is_named():
    with pytest.raises(EngineError, match="load: rank is 'x'"):
        Message("load", {"rank": "x"}).value("rank", int)
