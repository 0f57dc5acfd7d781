"""What the bytes of a response say, however the network cuts them; no network here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gossamer.measure.load.answer import events, read_answer
from gossamer.measure.load.stats import Answer
from gossamer.measure.load.wire import Exchange, read_body

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def sse(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def piece(text: str, finish: str | None = None) -> bytes:
    return sse({"choices": [{"text": text, "finish_reason": finish}]})


USAGE = sse({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}})
DONE = b"data: [DONE]\n\n"
STREAM = [piece("a"), piece("b"), piece("c", "length"), USAGE, DONE]
END = b"0\r\n\r\n"


def exchange(*pieces: bytes, error: str | None = None) -> Exchange:
    """Pieces that arrive one second apart, the first a second after the request."""
    return Exchange([(101.0 + i, data) for i, data in enumerate(pieces)], sent=100.0, ended=200.0, error=error)


def whole() -> bytes:
    return HEAD + b"".join(map(chunk, STREAM)) + END


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_response_reads_the_same_however_it_is_cut(size: int) -> None:
    data = whole()
    body = read_body([data[i : i + size] for i in range(0, len(data), size)])
    assert body.status == 200
    assert b"".join(body.parts) == b"".join(STREAM)
    assert body.complete
    assert not read_body([data[:-5]]).complete


def test_a_body_of_known_length_ends_with_its_last_byte() -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\n"
    assert not read_body([head, b"bus"]).complete
    body = read_body([head, b"bus", b"y"])
    assert (body.status, body.complete, b"".join(body.parts)) == (429, True, b"busy")


def test_an_event_has_the_moment_at_which_its_last_byte_arrived() -> None:
    pieces = [(1.0, b"data: a\n\ndata: b"), (2.0, b"c\n"), (3.0, b"\n: ping\n\ndata: d\r\n\r\n")]
    assert list(events(pieces)) == [(1.0, "a"), (2.0, "bc"), (3.0, "d")]


def test_a_stream_gives_arrivals_and_the_servers_own_counts() -> None:
    got = read_answer(exchange(HEAD, *map(chunk, STREAM), END))
    assert got == Answer(
        arrivals=(2.0, 3.0, 4.0), e2e=4.0, output_tokens=5, prompt_tokens=9, counted_by="usage", error=None
    )


def test_without_usage_the_pieces_are_counted_and_that_is_said() -> None:
    got = read_answer(exchange(HEAD, *map(chunk, [piece("a"), piece("b", "stop"), DONE]), END))
    assert (got.output_tokens, got.counted_by, got.prompt_tokens) == (2, "chunks", None)


def test_an_event_that_only_names_the_role_is_no_first_token() -> None:
    role = sse({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    word = sse({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]})
    assert read_answer(exchange(HEAD + chunk(role), chunk(word) + chunk(DONE) + END)).ttft == 2.0


def test_tokens_of_the_prompt_that_were_reused_are_told() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}}
    got = read_answer(exchange(HEAD + chunk(piece("a", "stop")) + chunk(sse({"choices": [], "usage": usage})) + END))
    assert got.cached_tokens == 8


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([], "connection: closed without an answer"),
        ([HEAD + chunk(piece("a"))], "stream: cut off"),
        ([HEAD + chunk(piece("a")) + END], "stream: cut off"),
        ([HEAD + END], "stream: an answer without events"),
        ([HEAD + chunk(piece("a")) + b"zz\r\n"], "stream: cut off"),
        ([HEAD + chunk(sse({"error": {"message": "the engine died"}})) + END], "stream: the engine died"),
        ([HEAD + chunk(b"data: {broken\n\n") + END], "stream: an event that is no JSON object"),
        ([HEAD + chunk(b"data: [1]\n\n") + END], "stream: an event that is no JSON object"),
        ([b"SSH-2.0-x\r\n\r\n"], "stream: cut off"),
        ([b'HTTP/1.1 429 No\r\ncontent-length: 28\r\n\r\n{"error":{"message":"busy"}}'], "HTTP 429: busy"),
        ([b"HTTP/1.1 500 No\r\n\r\noops\nlater"], "HTTP 500: oops later"),
        ([b"HTTP/1.1 502 Bad\r\ncontent-length: 0\r\n\r\n"], "HTTP 502: no message"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error_with_its_reason(pieces: list[bytes], reason: str) -> None:
    got = read_answer(exchange(*pieces))
    assert (got.error or "").startswith(reason)
    assert got.output_tokens == 0


def test_what_the_network_said_comes_before_what_is_missing() -> None:
    assert (
        read_answer(exchange(HEAD, error="timeout: not complete after 5 s")).error == "timeout: not complete after 5 s"
    )
