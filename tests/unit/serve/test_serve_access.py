"""Who may ask, from where, how much and how slowly."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator

import pytest
from serving import PATIENCE, Server, request_head, wait_until

from gossamer.cli import main
from gossamer.errors import UsageError
from gossamer.serve.server import ServerOptions, bind

KEY = "s3cret-Key"
ROUTES = [
    ("GET", "/"),
    ("GET", "/web/app.js"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("GET", "/version"),
    ("GET", "/nowhere"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health/"),
]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """A server with a key, with little patience and little room."""
    limits = ("--max-body", 20_000, "--max-bodies", 30_000, "--body-seconds", 2)
    with Server("--api-key", KEY, *limits) as server:
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        yield server
        assert KEY not in server.said()
        assert "Traceback" not in server.said()


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("said", [None, "Bearer", "Bearer s3cret", KEY, "Basic eDp5", "Basic ???", f"Token {KEY}"])
def test_without_the_key_nothing_is_told(guarded: Server, method: str, path: str, said: str | None) -> None:
    headers = {"Authorization": said or ""}
    answer = guarded.http.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"]


def test_every_route_but_one_is_among_those(guarded: Server) -> None:
    paths = guarded.http.get("/openapi.json").json()["paths"]
    known = {path.replace("fake", "{name}") for _, path in ROUTES}
    assert set(paths) - known == {"/health"}


def test_health_needs_no_key(guarded: Server) -> None:
    assert guarded.http.get("/health", headers={"Authorization": ""}).status_code == 200


def test_with_the_key_all_is_as_usual(guarded: Server) -> None:
    assert guarded.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    assert guarded.http.get("/", headers={"Authorization": f"Basic {basic}"}).status_code == 200


def ask(server: Server, data: bytes) -> tuple[int, dict[str, object]]:
    """Send bytes, and what comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(data)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def head(length: int, **headers: str) -> bytes:
    text = request_head("/v1/completions", length, **headers)
    return text.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n")


def test_a_body_that_is_announced_too_large_is_refused_unread(guarded: Server) -> None:
    status, answer = ask(guarded, head(10**12, Connection="close"))
    assert status == 413
    assert "20,000 bytes" in str(answer)


def test_a_body_that_becomes_too_large_is_refused(guarded: Server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = guarded.http.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_head_that_does_not_come_is_given_up(guarded: Server) -> None:
    for data in (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"):
        with socket.create_connection(("127.0.0.1", guarded.port), PATIENCE) as sock:
            sock.sendall(data)
            while sock.recv(65536):
                pass
    assert guarded.http.get("/health").status_code == 200


def test_a_body_that_does_not_come_is_given_up(guarded: Server) -> None:
    status, answer = ask(guarded, head(1000) + b'{"model"')
    assert status == 408
    assert "2 s" in str(answer)


def test_bodies_that_wait_have_room_only_together(guarded: Server) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), PATIENCE) as first:
        first.sendall(head(19_000) + b" " * 18_000)
        refused = wait_until(lambda: (r := guarded.chat("x" * 15_000)).status_code == 503 and r, "a full house")
        assert refused.headers["retry-after"]
        assert guarded.chat("abc", max_tokens=1).status_code == 200
    wait_until(lambda: guarded.chat("x" * 15_000).status_code == 400, "room again")  # too long for the model


def test_by_default_only_this_machine_is_served() -> None:
    with bind(ServerOptions(port=0)) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


def test_others_are_served_with_a_key_or_if_that_is_insisted_on() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UsageError, match="no API key") as caught:
            bind(ServerOptions(host=host, port=0))
        assert caught.value.hint is not None
        assert "--insecure" in caught.value.hint
    for options in (ServerOptions("0.0.0.0", 0, api_key="k"), ServerOptions("0.0.0.0", 0, insecure=True)):
        bind(options).close()
    with pytest.raises(UsageError, match="key is empty"):
        bind(ServerOptions("0.0.0.0", 0, api_key=""))


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no/such/model", "--port", str(port)]) == 2
    assert f"cannot serve on 127.0.0.1 port {port}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--kv-memory", "2XB"], "is not a size"),
        (["--kv-memory", "0"], "is not a size"),
        (["smollm2"], "two models are called 'smollm2'"),
        (["other", "--name", "a"], "1 names for 2 models"),
        (["--port", "70000"], "65535"),
        (["--api-key", ""], "key is empty"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    arguments: list[str], text: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOSSAMER_API_KEY", raising=False)
    assert main(["serve", "smollm2", *arguments]) == 2
    assert text in capfd.readouterr().err


def test_a_model_that_is_not_there_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "smollm", "--port", "0"]) == 2
    assert "did you mean 'smollm2'?" in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/", "/web/index.html"])
def test_no_other_site_can_show_the_page(path: str) -> None:
    with Server() as server:
        headers = server.http.get(path).headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-cache"
