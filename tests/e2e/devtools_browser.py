"""Headless Chromium driven over its own pipe (`--remote-debugging-pipe`): real clicks and keys, scripts, pictures.

Messages are JSON that end in a NUL byte; no websocket and no library are needed. Knows no page of ours.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "no chromium, no google-chrome (apt-get install chromium)"
TIMEOUT = 30.0  # seconds until whatever is waited for counts as failed

# The browser reads commands from descriptor 3 and writes to 4; this puts the given two there and becomes the browser.
_BECOME = """
import os, sys
read, write = (os.dup2(int(fd), 10 + i) for i, fd in enumerate(sys.argv[1:3]))
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One browser process; leaving it as a context ends it and removes what it wrote."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._count = 0
        self._received = b""
        self.events: list[dict[str, Any]] = []
        # Its sockets' paths may have a hundred letters: pytest's tmp_path is too long.
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--remote-debugging-pipe", f"--user-data-dir={self._scratch.name}/profile", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BECOME, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": self._scratch.name},
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)  # the browser ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        self._scratch.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command; what the browser reports meanwhile goes to `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        data = json.dumps({**message, "sessionId": session} if session else message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        deadline = time.monotonic() + TIMEOUT
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']['message']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_event(self, method: str, session: str, after: int) -> None:
        """Returns once a tab has reported this, among the events from number `after` on."""
        deadline = time.monotonic() + TIMEOUT
        while not any((e["method"], e.get("sessionId")) == (method, session) for e in self.events[after:]):
            self.events.append(self._receive(deadline))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has gone"
            self._received += data
        line, self._received = self._received.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def open(self, url: str, width: int = 1280, height: int = 860, dark: bool = False) -> Page:
        """A tab with storage of its own that has loaded the page."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.bringToFront")  # a tab behind another gets neither focus nor frames
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.wait("location.href !== 'about:blank' && document.readyState === 'complete'")
        # What is clicked before anything was painted is dropped by the browser.
        page.wait("performance.getEntriesByName('first-contentful-paint').length > 0")
        page.run("new Promise((painted) => requestAnimationFrame(() => requestAnimationFrame(painted)))")
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self._browser, self._session, self._context = browser, session, context

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def reload(self) -> None:
        """The page loaded anew: a script that runs while one document gives way to the next would be cut off."""
        before = len(self._browser.events)
        self.call("Page.reload")
        self._browser.wait_event("Page.loadEventFired", self._session, before)

    def close(self) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, expression: str) -> Any:
        """The JSON value of an expression, awaited; an exception in the page is one here."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"].get("exception", {}).get("description")
        return done["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of an expression as soon as it is true; fails with what the page showed."""
        deadline = time.monotonic() + TIMEOUT
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"never so: {expression}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """A press and release of the mouse in the middle of an element, which has to be what is seen there."""
        x, y, hit = self.run(f"""(() => {{
            const target = document.querySelector({json.dumps(selector)});
            target.scrollIntoView({{ block: "nearest" }});
            const box = target.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            const hit = document.elementFromPoint(x, y);
            return [x, y, box.width > 0 && target.contains(hit)];
        }})()""")
        assert hit, f"{selector} cannot be clicked: something else is there"
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """One key: Enter, Escape, Tab."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **fields, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def picture(self, path: Path) -> bytes:
        """A PNG of what is seen, also written to a file."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data

    def complaints(self) -> list[str]:
        """Exceptions, and what the browser refused or could not load, since the tab was opened."""
        self.run("0")  # whatever was said before this has arrived with its answer
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [e["params"]["exceptionDetails"] for e in mine if e["method"] == "Runtime.exceptionThrown"]
        logged = [e["params"]["entry"]["text"] for e in mine if e["method"] == "Log.entryAdded"]
        return [str(t.get("exception", {}).get("description", t["text"])) for t in thrown] + logged
