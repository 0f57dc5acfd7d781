"""The front of replicas: which one answers, what happens when it is lost, and what clients see of that."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Scope

from gossamer.serve.replicas.deploy import most_replicas
from gossamer.serve.replicas.front import Front, ReplicaLost, beginning
from gossamer.serve.replicas.replica import sent
from gossamer.serve.service import Limits

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
NO_ENGINE = {"type": "http.response.start", "status": 503, "headers": []}
OPENING = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'


def part(body: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Replicas:
    """Stands for the cluster: asked again, it sends the next list of messages, and is lost where one is None."""

    def __init__(self, *answers: list[Message | None]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Scope, bytes, str]] = []
        self.closed = 0
        self.metrics: list[tuple[str, bytes]] = []

    async def gather(self) -> list[tuple[str, bytes]]:
        return self.metrics

    async def ask(self, scope: Scope, body: bytes, chosen_by: str) -> AsyncGenerator[list[Message], None]:
        self.asked.append((scope, body, chosen_by))
        try:
            for message in self.answers.pop(0):
                if message is None:
                    raise ReplicaLost("it is gone")
                yield [message]
        finally:
            self.closed += 1


def run(
    front: Front, body: Any = None, path: str = "/v1/chat/completions", gone: bool = False, **headers: str
) -> tuple[int, bytes]:
    """Status and body of an answer; `gone`: the client goes away once it has sent its request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    said = {"content-type": "application/json", **headers}
    scope = {
        "type": "http", "method": "GET" if body is None else "POST", "path": path, "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in said.items()],
    }  # fmt: skip
    incoming = [{"type": "http.request", "body": data if body is not None else b"", "more_body": False}]
    outgoing: list[Message] = []

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        if not gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        outgoing.append(message)

    async def whole() -> None:
        async with asyncio.timeout(60):
            await front.app(scope, receive, send)

    asyncio.run(whole())
    if not outgoing:
        return 0, b""
    assert [m["type"] for m in outgoing] == ["http.response.start"] + ["http.response.body"] * (len(outgoing) - 1)
    return outgoing[0]["status"], b"".join(message["body"] for message in outgoing[1:])


def front_of(replicas: Replicas, key: str | None = None, **limits: Any) -> Front:
    return Front(replicas.ask, replicas.gather, Limits(**limits), key)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "abc"}]}


def test_an_answer_comes_through_and_the_key_stays_here() -> None:
    replicas = Replicas([START, part(b"{}")])
    front = front_of(replicas, key="secret")
    assert run(front, CHAT, authorization="Bearer secret") == (200, b"{}")
    (scope, body, _) = replicas.asked[0]
    assert json.loads(body) == CHAT
    assert scope["path"] == "/v1/chat/completions"
    assert [name for name, _ in scope["headers"]] == [b"content-type"]
    assert front.in_flight == 0


def test_a_request_whose_replica_is_lost_before_its_answer_is_asked_of_another() -> None:
    replicas = Replicas(
        [None], [START, None], [STREAM, part(OPENING, True), None], [STREAM, part(OPENING, True), part(b"x")]
    )
    front = front_of(replicas)
    assert run(front, CHAT | {"stream": True}) == (200, OPENING + b"x")
    chosen_by = [asked[2] for asked in replicas.asked]
    assert len(set(chosen_by)) == 4  # not of the one that it belongs to once more
    assert front.retried == 1
    assert replicas.closed == 4


def test_a_replica_without_an_engine_is_passed_over() -> None:
    replicas = Replicas([NO_ENGINE, part(b"restarting")], [START, part(b"{}")])
    assert run(front_of(replicas), CHAT) == (200, b"{}")


def test_a_stream_that_has_begun_ends_with_an_error_and_is_not_asked_again() -> None:
    replicas = Replicas([STREAM, part(OPENING, True), part(b"data: 1\n\n", True), None], [START, part(b"{}")])
    status, body = run(front_of(replicas), CHAT)
    assert status == 200
    events = body.split(b"\n\n")
    assert events[1] == b"data: 1"
    assert json.loads(events[2].removeprefix(b"data: "))["error"]["code"] == "engine_lost"
    assert b"[DONE]" not in body
    assert len(replicas.asked) == 1


def test_a_request_that_no_replica_takes_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.serve.replicas.front.SECONDS_OF_GRACE", 0.0)
    replicas = Replicas(*[[None]] * 100)
    status, body = run(front_of(replicas, request_seconds=0.3), CHAT)
    assert status == 504
    assert json.loads(body)["error"]["message"] == "not answered within 0.3 s"


def test_health_is_that_of_any_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(front_of(Replicas([NO_ENGINE, part(b"")], [START, part(b"fine")])), path="/health") == (200, b"fine")
    monkeypatch.setattr("gossamer.serve.replicas.front.SECONDS_TO_CHECK", 0.2)
    status, body = run(front_of(Replicas(*[[None]] * 100)), path="/health")
    assert (status, json.loads(body)["status"]) == (503, "unavailable")
    front = front_of(Replicas())
    front.draining = True
    status, body = run(front, path="/health")
    assert (status, json.loads(body)["status"]) == (503, "draining")


@pytest.mark.parametrize(
    ("body", "status"), [(b"{", 400), (b"[" * 200 + b"]" * 200, 400), (b'"' + b"x" * 2000 + b'"', 413)]
)
def test_what_cannot_be_taken_costs_no_replica_anything(body: bytes, status: int) -> None:
    replicas = Replicas()
    assert run(front_of(replicas, max_body=1000), body)[0] == status
    assert replicas.asked == []


def test_without_the_key_and_while_draining_nothing_is_asked() -> None:
    replicas = Replicas()
    front = front_of(replicas, key="secret")
    assert run(front, CHAT)[0] == 401
    front.draining = True
    assert run(front, CHAT, authorization="Bearer secret")[0] == 503
    assert replicas.asked == []


def test_metrics_are_those_of_all_replicas_told_apart() -> None:
    replicas = Replicas()
    text = '# HELP gossamer:a_total What.\n# TYPE gossamer:a_total counter\ngossamer:a_total{model_name="m"} %d\n'
    replicas.metrics = [("one:1", (text % 3).encode()), ("two:2", (text % 4).encode())]
    status, body = run(front_of(replicas), path="/metrics")
    assert status == 200
    (a, retries) = text_string_to_metric_families(body.decode())
    assert {sample.labels["replica"]: sample.value for sample in a.samples} == {"one:1": 3, "two:2": 4}
    assert {sample.labels["model_name"] for sample in a.samples} == {"m"}
    assert (retries.name, retries.samples[0].value) == ("gossamer:request_retries", 0)


def test_a_client_that_goes_away_ends_what_its_replica_does() -> None:
    ended = asyncio.Event()

    async def ask(scope: Scope, body: bytes, chosen_by: str) -> AsyncGenerator[list[Message], None]:
        try:
            yield [STREAM, part(b"data: 1\n\n", True)]
            await asyncio.Event().wait()
        finally:
            ended.set()

    front = Front(ask, Replicas().gather, Limits(), None)
    status, _ = run(front, CHAT, gone=True)
    assert status in (0, 200)
    assert ended.is_set()
    assert front.in_flight == 0


def turns(*contents: str) -> bytes:
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return json.dumps({"model": "m", "messages": messages}).encode()


def test_all_turns_of_a_conversation_go_by_its_first_question() -> None:
    first = beginning(turns("be kind", "why?"))
    assert first == beginning(turns("be kind", "why?", "because", "and then?"))
    assert len({first, beginning(turns("be kind", "who?")), beginning(turns("be rude", "why?"))}) == 3


def test_texts_that_begin_alike_go_by_their_beginning() -> None:
    def of(**request: Any) -> str:
        return beginning(json.dumps(request).encode())

    assert of(prompt="a" * 5000) == of(prompt="a" * 4000 + "b")
    assert of(prompt="ab") == of(prompt=["ab", "c"]) != of(prompt="abc")
    assert of(prompt=[1, 2]) == of(prompt=[[1, 2], [3]]) != of(prompt=[1, 3])
    assert of(prompt="ab", model="m") != of(prompt="ab", model="n")
    assert beginning(b"") == of(tokens=[1]) == beginning(b"3") == ""


@pytest.mark.parametrize("body", [b'{"messages": 3}', b'{"messages": [3, null]}', b'{"prompt": {"a": 1}}', b"[]"])
def test_the_beginning_of_anything_is_some_text(body: bytes) -> None:
    assert isinstance(beginning(body), str)


async def _all(messages: AsyncIterator[list[Message]]) -> list[Message]:
    return [message async for some in messages for message in some]


def collected(app: Callable[..., Coroutine[Any, Any, None]]) -> list[Message]:
    return asyncio.run(_all(sent(app, {"path": "/"}, b"body")))


def test_a_replica_sends_what_its_application_sends_in_order() -> None:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"body"
        for number in range(5):
            await send({"number": number})
            await asyncio.sleep(0 if number % 2 else 0.001)

    assert [message["number"] for message in collected(app)] == list(range(5))


def test_an_application_that_fails_ends_its_messages() -> None:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        await send({"number": 0})
        raise RuntimeError("broken")

    assert collected(app) == [{"number": 0}]


def test_who_stops_listening_ends_the_application() -> None:
    ended: list[bool] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        try:
            await send({"number": 0})
            await receive()
            await receive()
        finally:
            ended.append(True)

    async def listen() -> None:
        messages = sent(app, {"path": "/"}, b"")
        async for _ in messages:
            break
        await messages.aclose()  # type: ignore[attr-defined]

    asyncio.run(listen())
    assert ended == [True]


@pytest.mark.parametrize("slots", list(itertools.combinations_with_replacement(range(4), 4)))
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_as_many_replicas_fit_as_can_be_placed_one_after_another(slots: tuple[int, ...], nodes: int) -> None:
    free, placed = sorted(slots), 0
    while free[-nodes] > 0:  # each on the nodes with most room
        free = sorted([*free[:-nodes], *(left - 1 for left in free[-nodes:])])
        placed += 1
    assert most_replicas(slots, nodes) == placed
