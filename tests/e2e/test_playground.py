"""The playground in a real browser, against a server that does what a script says: clicks, streams, faults, a picture.

A script is what one model does with one prompt: pieces of text, and steps like a wait for the test or an error.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from devtools_browser import CHROMIUM, MISSING, Browser, Page
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=MISSING)]
WEB = Path(__file__).parents[2] / "src" / "gossamer" / "serve" / "web"


@dataclass(frozen=True)
class Hold:
    """Wait until the test lets go, or the reader has gone."""

    gate: str


@dataclass(frozen=True)
class Raw:
    """Bytes as they stand, and nothing after them."""

    data: bytes


@dataclass(frozen=True)
class Usage:
    """The last chunk, with the numbers of the engine if there are any."""

    tokens: int
    gossamer: dict[str, float] | None = None


@dataclass(frozen=True)
class Refuse:
    """An error in place of a stream."""

    status: int
    body: Any
    headers: dict[str, str] | None = None


Script = Sequence[str | Hold | Raw | Usage] | Refuse


class Server:
    """A small OpenAI server on a free port, in a thread, that serves the page too."""

    def __init__(self, models: Sequence[str], scripts: dict[tuple[str, str], Script], key: str | None = None) -> None:
        self.models, self.scripts, self.key = list(models), dict(scripts), key
        self.asked: list[dict[str, Any]] = []
        self.gone: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        routes = [
            Route("/", lambda _: FileResponse(WEB / "index.html")),
            Route("/v1/models", self._list),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Mount("/web", StaticFiles(directory=WEB)),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()  # the socket listens already: a browser that is early waits
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self.gates.values():
            gate.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def let_go(self, name: str) -> None:
        self.gates.setdefault(name, threading.Event()).set()

    def answers(self, prompt: str, **scripts: Script) -> None:
        """What the models do with a prompt."""
        self.scripts.update({(model, prompt): script for model, script in scripts.items()})

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "a key is needed"}}, 401)

    async def _list(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"data": [{"id": name} for name in self.models]})

    async def _chat(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        self.asked.append(body)
        script = self.scripts[body["model"], body["messages"][-1]["content"]]
        if isinstance(script, Refuse):
            return JSONResponse(script.body, script.status, script.headers)
        return StreamingResponse(self._stream(request, body["model"], script), media_type="text/event-stream")

    async def _stream(self, request: Request, model: str, script: Sequence[Any]) -> AsyncIterator[bytes]:
        whole = False
        try:
            yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for step in script:
                if isinstance(step, Hold):
                    await self._hold(request, step.gate)
                elif isinstance(step, Raw):
                    yield step.data
                    whole = True
                    return
                else:
                    yield _event(_chunk(step))
            yield b"data: [DONE]\n\n"
            whole = True
        finally:
            if not whole:
                self.gone.append(model)

    async def _hold(self, request: Request, name: str) -> None:
        gate = self.gates.setdefault(name, threading.Event())
        while not gate.is_set():
            await asyncio.sleep(0.005)
            if await request.is_disconnected():
                raise asyncio.CancelledError


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _chunk(step: str | Usage) -> dict[str, Any]:
    if isinstance(step, str):
        return {"choices": [{"delta": {"content": step}}]}
    usage = {"completion_tokens": step.tokens, **({"gossamer": step.gossamer} if step.gossamer else {})}
    return {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(["original", "small"], {}) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    page = _open(browser, server)
    yield page
    assert page.complaints() == []
    page.close()


def _open(browser: Browser, server: Server, **look: Any) -> Page:
    page = browser.open(server.url, **look)
    page.wait("!document.querySelector('#send').disabled || !document.querySelector('#key-form').hidden")
    return page


@pytest.fixture(scope="module")
def lasting(browser: Browser) -> Iterator[tuple[Server, Page]]:
    """A server and its page for many tests: each begins a new conversation."""
    with Server(["original", "small"], {}) as server:
        page = _open(browser, server)
        yield server, page
        page.close()


def _renew(lasting: tuple[Server, Page]) -> tuple[Server, Page]:
    server, page = lasting
    server.asked.clear()
    page.call("Page.bringToFront")
    page.click("#new")
    page.wait("document.querySelectorAll('.turn').length === 0")
    return server, page


def _ask(page: Page, prompt: str) -> None:
    page.click("#prompt")
    page.type(prompt)
    page.click("#send")


def _finish(page: Page, prompt: str) -> dict[str, Any]:
    """Ask, wait for the end, and say what the last turn shows."""
    _ask(page, prompt)
    page.wait(f"document.querySelector('.turn:last-child .prompt')?.textContent === {json.dumps(prompt)}")
    page.wait("document.querySelector('#stop').hidden")
    return _shown(page)


def _shown(page: Page) -> dict[str, Any]:
    """The last turn and the heads above it, as text."""
    shown: dict[str, Any] = page.run("""(() => {
      const turn = document.querySelector(".turn:last-child");
      const of = (root, what) => [...root.querySelectorAll(what)];
      const text = (root, what) => of(root, what).map((e) => e.textContent).join("");
      const answers = of(turn, ".answer");
      return {
        verdict: turn.querySelector(".verdict").textContent,
        texts: answers.map((a) => of(a, ".text > *").map((block) => block.textContent)),
        marked: answers.map((a) => text(a, "mark")),
        first: answers.map((a) => text(a, "mark.first")),
        errors: answers.map((a) => text(a, ".error")),
        states: answers.map((a) => text(a, ".state")),
        titles: answers.map((a) => text(a, "h3")),
        numbers: of(document, ".head:not([hidden])").map((head) =>
          of(head, "dl > :not([hidden]) dd").map((number) => number.textContent)),
      };
    })()""")
    return shown


def test_a_click_on_send_streams_both_answers_at_once(server: Server, page: Page) -> None:
    told = {"ttft_s": 0.0421, "tokens_per_s": 87.26, "acceptance_rate": 0.625}
    server.answers(
        "Why?",
        original=["Because ", "it ", Hold("end"), "is.", Usage(3)],
        small=["Because ", "it ", Hold("end"), "was.", Usage(3, told)],
    )
    _ask(page, "Why?")
    page.wait("[...document.querySelectorAll('.text')].filter((t) => t.textContent === 'Because it ').length === 2")
    half = _shown(page)
    assert half["verdict"] == "Identical so far, 11 characters"
    assert half["marked"] == ["", ""]
    assert [numbers[2].strip() for numbers in half["numbers"]] == ["2", "2"], "tokens are counted as they come"
    assert all(numbers[0].endswith(" ms") for numbers in half["numbers"])
    server.let_go("end")
    page.wait("document.querySelector('#stop').hidden")
    whole = _shown(page)
    assert whole["texts"] == [["Because it is."], ["Because it was."]]
    assert whole["verdict"] == "Parted at token 3, character 12"
    assert whole["marked"] == ["is.", "was."]
    assert whole["numbers"][1] == ["42 ms", "87.3 tok/s", "3 ", "63 %"], "the server's own numbers, where it gives them"
    assert len(whole["numbers"][0]) == 3, "no acceptance rate where nothing was drafted"
    common = {
        "messages": [{"role": "user", "content": "Why?"}], "temperature": 0, "max_tokens": 256, "seed": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert sorted(server.asked, key=lambda body: body["model"]) == [
        {"model": "original", **common},
        {"model": "small", **common},
    ]


@pytest.mark.parametrize(
    ("left", "right", "verdict", "marked", "first"),
    [
        (["same", " text"], ["sa", "me text"], "Identical, 9 characters", ["", ""], ["", ""]),
        (["red", " fish"], ["blue", " fish"], "Parted at token 1, character 1", ["red fish", "blue fish"], ["r", "b"]),
        (
            ["one ", "two"], ["one ", "two", " three"],
            "Parted at token 3, character 8, where the left answer ends", ["", " three"], ["", " "],
        ),
        (["a\U0001f600", "x"], ["a\U0001f601", "x"], "Parted at token 1, character 2",
         ["\U0001f600x", "\U0001f601x"], ["\U0001f600", "\U0001f601"]),
        (["Up.", "\n\n", "Left."], ["Up.", "\n\n", "Right", "."], "Parted at token 3, character 6",
         ["Left.", "Right."], ["L", "R"]),
        (["a b", "c"], ["a ", "bd"], "Parted at token 2, character 4", ["c", "d"], ["c", "d"]),
    ],
    ids=["identical", "first-character", "one-ends-first", "beyond-16-bits", "second-paragraph", "cut-otherwise"],
)  # fmt: skip
def test_answers_are_marked_from_where_they_part(
    lasting: tuple[Server, Page],
    left: list[str],
    right: list[str],
    verdict: str,
    marked: list[str],
    first: list[str],
) -> None:
    server, page = _renew(lasting)
    server.answers("Go", original=[*left, Usage(len(left))], small=[*right, Usage(len(right))])
    shown = _finish(page, "Go")
    assert (shown["verdict"], shown["marked"], shown["first"]) == (verdict, marked, first)


def test_a_token_number_is_only_said_to_be_about_right_where_pieces_are_not_tokens(server: Server, page: Page) -> None:
    server.answers("Go", original=["one two", " three", Usage(3)], small=["one two", " four", Usage(3)])
    assert _finish(page, "Go")["verdict"] == "Parted at token 2, character 9", "the end token may be counted as one"
    server.answers("On", original=["one two", " three", Usage(7)], small=["one two", " four", Usage(7)])
    differs = " · what was said before differs already"
    assert _finish(page, "On")["verdict"] == f"Parted at about token 2, character 9{differs}"


def test_stop_ends_both_requests_and_the_conversation_goes_on(server: Server, page: Page) -> None:
    server.answers("Count", original=["One", Hold("never")], small=["One", " two", Hold("never")])
    server.answers("More", original=["Three", Usage(1)], small=["Three", Usage(1)])
    _ask(page, "Count")
    page.wait("document.querySelector('.turn').innerText.includes('One two')")
    page.click("#stop")
    page.wait("document.querySelector('#stop').hidden")
    shown = _shown(page)
    assert shown["states"] == ["Stopped", "Stopped"]
    assert shown["verdict"] == "Identical as far as both went, 3 characters", "what was stopped did not part"
    _until(lambda: sorted(server.gone) == ["original", "small"])
    assert _finish(page, "More")["texts"] == [["Three"], ["Three"]]
    said = {body["model"]: [message["content"] for message in body["messages"]] for body in server.asked[2:]}
    assert said == {"original": ["Count", "One", "More"], "small": ["Count", "One two", "More"]}


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "message", "text"),
    [
        (["Hel", Raw(b'data: {"error": {"message": "the worker died"}}\n\n')], "the worker died", "Hel"),
        (["Hel"], None, "Hel"),
        (["Hel", Raw(b'data: {"choi')], "Cut: the stream ended before the answer did.", "Hel"),
        (["Hel", Raw(b"data: nonsense\n\n")], "The stream holds what is not JSON: nonsense", "Hel"),
        (Refuse(400, {"error": {"message": "max_tokens: at most 99"}}), "400: max_tokens: at most 99", ""),
        (Refuse(429, {"error": {"message": "busy"}}, {"Retry-After": "7"}), "429: busy Try again in 7 s.", ""),
        (Refuse(500, {"detail": [{"loc": ["x"]}]}), '500: [{"loc":["x"]}]', ""),
    ],
    ids=["error-event", "whole", "cut", "not-json", "bad-request", "overloaded", "framework-error"],
)  # fmt: skip
def test_an_error_is_shown_in_its_column_and_the_other_goes_on(
    lasting: tuple[Server, Page], script: Script, message: str | None, text: str
) -> None:
    server, page = _renew(lasting)
    server.answers("Hi", original=["Hello", Usage(1)], small=script)
    shown = _finish(page, "Hi")
    assert shown["errors"] == ["", message or ""]
    assert ["".join(blocks) for blocks in shown["texts"]] == ["Hello", text]
    again = "[...document.querySelectorAll('.again')].map((b) => !b.hidden)"
    assert page.run(again) == [False, message is not None]
    if message is not None:
        server.answers("Hi", small=["Hello", Usage(1)])
        page.click(".answer + .answer .again")
        page.wait("document.querySelector('.verdict').textContent === 'Identical, 5 characters'")
        assert _shown(page)["errors"] == ["", ""]
        assert len(server.asked) == 3, "only the failed one was asked again"


def test_an_answer_that_was_cut_is_not_called_identical(browser: Browser, server: Server) -> None:
    page = _open(browser, server)
    server.answers("Hi", original=["Hel", Raw(b"")], small=["Hel", Usage(1)])
    assert _finish(page, "Hi")["verdict"] == "Identical as far as both went, 3 characters"
    page.close()


def test_a_list_of_models_that_fails_can_be_asked_for_again(browser: Browser) -> None:
    with Server([], {}) as server:
        page = browser.open(server.url)
        page.wait("document.querySelector('#notice').innerText.startsWith('The server has no model to talk to.')")
        server.models = ["only"]
        page.click("#notice button")
        page.wait("document.querySelector('#notice').hidden && !document.querySelector('#send').disabled")
        assert page.run("document.querySelector('#heads select').value") == "only"
        page.close()


def test_a_server_that_has_gone_is_an_error_in_the_column(browser: Browser) -> None:
    with Server(["original", "small"], {}) as server:
        page = _open(browser, server)
    errors = _finish(page, "Hi")["errors"]
    assert len(errors) == 2
    assert all(error.startswith("The server cannot be reached") for error in errors)
    page.close()


def test_a_key_is_asked_for_kept_for_the_tab_and_sent(browser: Browser) -> None:
    with Server(["original", "small"], {}, key="right") as server:
        page = _open(browser, server)
        assert page.run("document.activeElement.id") == "key"
        page.type("wrong")
        page.press("Enter")
        page.wait("document.querySelector('#key-note').textContent === 'The server refused this key.'")
        page.run("document.activeElement.select()")
        page.type("right")
        page.click("#key-form button")
        page.wait("document.querySelector('#key-form').hidden && !document.querySelector('#send').disabled")
        server.answers("Hi", original=["Hello", Usage(1)], small=["Hello", Usage(1)])
        assert _finish(page, "Hi")["texts"] == [["Hello"], ["Hello"]]
        server.key = "newer"
        assert all(error.startswith("401: a key is needed") for error in _finish(page, "Hi")["errors"])
        page.type("newer")
        page.press("Enter")
        page.wait("document.querySelector('.turn:last-child .verdict').textContent.startsWith('Identical, 5')")
        page.reload()
        page.wait("!document.querySelector('#send').disabled")
        assert page.run("document.querySelector('#key-form').hidden"), "a reload does not forget the key"
        page.close()


def test_a_password_in_the_address_does_not_keep_the_page_from_asking(browser: Browser, server: Server) -> None:
    page = browser.open(server.url.replace("//", "//name:secret@"))
    page.wait("!document.querySelector('#send').disabled")
    assert "secret" in page.run("document.baseURI")
    page.close()


def test_one_model_has_one_column_and_can_be_asked_under_two_settings(browser: Browser) -> None:
    with Server(["only"], {}) as server:
        server.answers("Hi", only=["Hello", Usage(1)])
        page = _open(browser, server)
        shown = _finish(page, "Hi")
        assert (shown["texts"], shown["verdict"], len(shown["numbers"])) == ([["Hello"]], "", 1)
        page.click("#settings-button")
        page.click("#separate")
        page.run("document.querySelectorAll('[name=temperature]')[1].select()")
        page.type("0.5")
        shown = _finish(page, "Hi")
        assert shown["titles"] == ["only, temperature 0", "only, temperature 0.5"]
        assert shown["texts"] == [["Hello"], ["Hello"]]
        assert shown["verdict"].startswith("Identical, 5 characters")
        assert [body["temperature"] for body in server.asked] == [0, 0, 0.5]
        assert page.complaints() == []
        page.close()


def test_a_setting_out_of_bounds_is_not_sent(server: Server, page: Page) -> None:
    page.run("document.querySelector('[name=max_tokens]').value = '0'")
    _ask(page, "Hi")
    page.wait("!document.querySelector('#settings').hidden")
    assert page.run("document.activeElement.name") == "max_tokens"
    assert page.run("document.querySelector('#prompt').value") == "Hi"
    assert server.asked == []


def test_one_after_the_other_asks_the_second_when_the_first_has_answered(server: Server, page: Page) -> None:
    server.answers("Hi", original=["Hello", Hold("first"), Usage(1)], small=["Hello", Usage(1)])
    page.run("document.querySelector('#in-turn').checked = true")
    _ask(page, "Hi")
    page.wait("document.querySelector('.answer + .answer .state').textContent === 'Waiting for its turn'")
    page.wait("document.querySelector('.answer .text').textContent === 'Hello'")
    assert [body["model"] for body in server.asked] == ["original"]
    server.let_go("first")
    page.wait("document.querySelector('.verdict').textContent === 'Identical, 5 characters'")
    assert [body["model"] for body in server.asked] == ["original", "small"]


def test_models_are_chosen_and_a_new_conversation_forgets_the_old(server: Server, page: Page) -> None:
    server.answers("Hi", original=["A", Usage(1)], small=["B", Usage(1)])
    page.run("""(() => {
      const [left] = document.querySelectorAll("#heads select");
      left.value = "small";
      left.dispatchEvent(new Event("change"));
    })()""")
    assert _finish(page, "Hi")["titles"] == ["small", "small"]
    page.click("#new")
    page.wait("document.querySelectorAll('.turn').length === 0")
    assert page.run("document.activeElement.id") == "prompt"
    _finish(page, "Hi")
    assert [len(body["messages"]) for body in server.asked] == [1, 1, 1, 1]


def test_the_keyboard_alone_is_enough(server: Server, page: Page) -> None:
    server.answers("a\nb", original=["A", Usage(1)], small=[Hold("never")])
    assert page.run("document.activeElement.id") == "prompt"
    page.type("a")
    page.press("Enter", shift=True)
    page.type("b")
    page.press("Enter")
    page.wait("document.querySelector('.answer .text').textContent === 'A'")
    page.press("Escape")
    page.wait("document.querySelector('.answer + .answer .state').textContent === 'Stopped'")
    assert server.asked[0]["messages"] == [{"role": "user", "content": "a\nb"}]
    unnamed = """[...document.querySelectorAll("input, select, textarea, button")].filter((control) =>
      !(control.labels?.[0]?.textContent.trim() || control.textContent.trim())).map((c) => c.outerHTML)"""
    assert page.run(unnamed) == []
    assert page.run("document.querySelector('#status').textContent").endswith("original: 1 tokens. small: 0 tokens")


def test_hostile_text_is_shown_and_does_not_run(browser: Browser) -> None:
    bad = "<img src=x onerror=\"window.owned=1\"><script>window.owned=1</script><a href='javascript:1'>a</a>"
    with Server([bad, "b" + bad], {}) as server:
        answer: Script = [f"{bad}\n\n```html\n{bad}\n```\n", bad, Usage(2)]
        refused = Refuse(400, {"error": {"message": bad}})
        server.answers(bad, **dict.fromkeys(server.models, answer))
        server.answers("Hi", **dict.fromkeys(server.models, refused))
        page = _open(browser, server)
        shown = _finish(page, bad)
        assert shown["texts"] == [[bad, bad, bad]] * 2
        assert page.run("document.querySelectorAll('.answer .text > pre').length") == 2
        assert shown["titles"][0] == bad
        assert _finish(page, "Hi")["errors"] == [f"400: {bad}"] * 2
        assert page.run("[window.owned ?? null, document.images.length, document.links.length]") == [None, 0, 0]
        assert not [complaint for complaint in page.complaints() if "400 (Bad Request)" not in complaint]
        page.close()


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 860, False), (390, 844, True)])
def test_a_picture_can_be_taken_and_nothing_scrolls_sideways(
    server: Server, browser: Browser, tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    long = "incomprehensibilities" * 20
    code = f"\n\n```\n{long}\n```\n"
    server.answers("Hi", original=["Hello", " there", code, Usage(3)], small=["Hello", long, Usage(2)])
    page = _open(browser, server, width=width, height=height, dark=dark)
    _finish(page, "Hi")
    page.click("#settings-button")
    widths = page.run("""["html", "#conversation", "#settings"].map((name) => document.querySelector(name))
        .map((element) => element.scrollWidth - element.clientWidth)""")
    assert widths == [0, 0, 0]
    assert page.run("document.documentElement.scrollHeight") == height, "only the conversation scrolls"
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 23, 26)" if dark else "rgb(252, 251, 249)")
    data = page.picture(tmp_path / "page.png")
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (width, height)
    assert len(data) > 20_000, "an empty page would be far smaller"
    page.close()


def test_the_page_of_the_server_itself_talks_to_it(browser: Browser, real: str) -> None:
    page = browser.open(real)
    page.wait("!document.querySelector('#send').disabled")
    shown = _finish(page, "say:hello there")
    assert (shown["texts"], shown["errors"]) == ([["hello there"], ["hello there"]], ["", ""])
    assert shown["verdict"] == "Identical, 11 characters"
    assert [numbers[2] for numbers in shown["numbers"]] == ["12 ", "12 "], "the end is a token too"
    _ask(page, "abc")
    page.wait("[...document.querySelectorAll('.turn:last-child .text')].every((text) => text.textContent.length > 3)")
    page.click("#stop")
    page.wait("document.querySelector('#stop').hidden")
    assert _shown(page)["states"] == ["Stopped", "Stopped"]
    page.wait("""fetch("metrics").then((answer) => answer.text()).then((text) =>
        text.match(/^gossamer:num_requests_running.*/gm).filter((line) => line.endsWith(" 0.0")).length === 2)""")
    assert page.complaints() == []
    page.close()


@pytest.fixture
def real() -> Iterator[str]:
    """The address of the server itself, over two engines that need no model."""
    program = Path(__file__).parents[1] / "unit" / "serve" / "fake_server.py"
    command = [sys.executable, str(program), "--names", "original", "small", "--delay", "0.02"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=program.parent) as process:
        assert process.stdout is not None
        said, _, url = process.stdout.readline().strip().partition(" ")
        assert said == "ready"
        yield url
        process.terminate()


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        ("data: a\n\ndata: b\n\n", ["a", "b"]),
        ("data: a\r\n\r\ndata:b\r\rdata: c\n\r\n", ["a", "b", "c"]),
        (": still here\n\nevent: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"]),
        ("data: one\ndata: two\n\n", ["one\ntwo"]),
        ("data: one\r\ndata: two\r\n\r\n", ["one\ntwo"]),
        ("data\n\ndata:\n\n", ["", ""]),
        ("data:  a: b\n\n", [" a: b"]),
        ("data: never ended\n", []),
        ("data: \u2028\u00e9\U0001f600\n\n", ["\u2028\u00e9\U0001f600"]),
        ("datum: a\n\n: data: b\n\n", []),
    ],
)
def test_events_are_read_however_the_stream_is_cut(reader: Page, stream: str, events: list[str]) -> None:
    found = reader.run(f"""(async () => {{
      const {{ EventParser }} = await import("./web/stream.js");
      const stream = {json.dumps(stream)}, cuts = new Set();
      for (let size = 1; size <= stream.length; size += 1) {{
        const parser = new EventParser(), events = [];
        for (let at = 0; at < stream.length; at += size) events.push(...parser.push(stream.slice(at, at + size)));
        cuts.add(JSON.stringify(events));
      }}
      return [...cuts].map(JSON.parse);
    }})()""")
    assert found == [events]


def test_numbers_are_those_of_the_clock_until_the_server_tells_its_own(reader: Page) -> None:
    found = reader.run("""(async () => {
      const { Answer, written } = await import("./web/answer.js");
      const clock = performance.now;
      const at = (ms, act) => { performance.now = () => ms; act(); };
      const piece = (text) => () => answer.take({ text, finish: null, usage: null });
      const answer = new Answer("title", {});
      const seen = [written(answer.numbers)];
      at(1000, () => answer.begin());
      at(1250, piece("a"));
      seen.push(written(answer.numbers));
      at(1500, piece("b"));
      at(1750, piece("c"));
      seen.push(written(answer.numbers));
      const gossamer = { ttft_s: 12.34, tokens_per_s: null, acceptance_rate: 0 };
      at(1800, () => answer.take({ text: "", finish: "stop", usage: { completion_tokens: 6, gossamer } }));
      seen.push(written(answer.numbers));
      performance.now = clock;
      return seen;
    })()""")
    assert found == [
        {"ttft": None, "speed": None, "tokens": None, "accepted": None},
        {"ttft": [250, "ms"], "speed": None, "tokens": [1, ""], "accepted": None},
        {"ttft": [250, "ms"], "speed": ["4.0", "tok/s"], "tokens": [3, ""], "accepted": None},
        {"ttft": ["12.3", "s"], "speed": ["10.0", "tok/s"], "tokens": [6, ""], "accepted": [0, "%"]},
    ]


def test_a_text_falls_into_paragraphs_and_code(reader: Page) -> None:
    cases = {
        "": [],
        "\n \n": [],
        "one\ntwo\n\n\nthree": ["one\ntwo", "three"],
        "see\n```py\nx = 1\n\ny\n```\nend": ["see", "CODE x = 1\n\ny", "end"],
        "```\nopen": ["CODE open"],
        "~~~\n```\n~~~": ["CODE ```"],
        "```x``` is inline": ["```x``` is inline"],
    }
    found = reader.run(f"""(async () => {{
      const {{ blocks }} = await import("./web/text.js");
      const shown = (text) => blocks(text).map((b) => (b.code ? "CODE " : "") + text.slice(b.start, b.end));
      return {json.dumps(list(cases))}.map(shown);
    }})()""")
    assert dict(zip(cases, found, strict=True)) == cases


@pytest.fixture(scope="module")
def reader(browser: Browser) -> Iterator[Page]:
    """A page for the tests of its modules alone."""
    with Server(["only"], {}) as server:
        page = browser.open(server.url)
        yield page
        page.close()
