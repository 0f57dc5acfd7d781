"""Chat templates, rendered in child processes that a template can exhaust but not leave. Knows no tokenizer.

A template that loops, grows without end or reaches for Python's internals costs its own worker and at most DEADLINE
seconds; other requests have other workers. `_template_worker.py` is the other side.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import ChatTemplateError

DEADLINE = 2.0
"""Seconds for one rendering."""
STARTUP = 60.0
"""Seconds for a worker to come up, on a machine that is busy with a model."""
WORKERS = 4
MAX_REQUEST = 64 << 20
MAX_ANSWER = 8 << 20
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of JSON-like variables. Raises ChatTemplateError. Any thread may call it."""
    try:
        request = json.dumps({"template": template, "variables": variables}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"messages must be plain JSON: {error}") from error
    if len(request) > MAX_REQUEST:
        raise ChatTemplateError(f"a conversation of {len(request)} bytes, more than {MAX_REQUEST}")
    answer = _POOL.ask(request)
    text = answer.get("text")
    if not isinstance(text, str):
        verb = "refused the conversation" if answer.get("kind") == "raised" else "failed"
        raise ChatTemplateError(f"the chat template {verb}: {answer.get('error')}")
    return text


def prepare() -> None:
    """Start a worker that the first rendering will find; it comes up while its parent does something else."""
    _POOL.prepare()


class _Worker:
    """One child process and the pipes to it. Raises _LostError when it does not answer."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("_template_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},  # no secret reaches a template
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._is_up = False

    def ask(self, request: bytes) -> dict[str, Any]:
        self._come_up()
        deadline = time.monotonic() + DEADLINE
        self._send(len(request).to_bytes(4, "big") + request, deadline)
        return self._receive(deadline)

    def _come_up(self) -> None:
        """Wait for its first frame, the one that answers nothing. Raises ChatTemplateError."""
        if self._is_up:
            return
        try:
            self._receive(time.monotonic() + STARTUP)
        except _LostError as lost:
            raise ChatTemplateError(
                f"the process for chat templates does not start ({lost})", hint="is jinja2 installed for this Python?"
            ) from lost
        self._is_up = True

    def runs(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._process.wait()

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._stdin, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise _LostError("its process ended") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(4, deadline), "big")
        if size > MAX_ANSWER:
            raise _LostError(f"an answer of {size} bytes")
        answer: dict[str, Any] = json.loads(self._read(size, deadline))
        return answer

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            _wait(self._stdout, select.POLLIN, deadline)
            try:
                piece = os.read(self._stdout, count - len(data))
            except BlockingIOError:
                continue
            if not piece:
                raise _LostError("its process ended: out of memory or time")
            data += piece
        return bytes(data)


class _LostError(Exception):
    """A worker that is of no more use."""


class _Pool:
    """Up to WORKERS workers, started when needed; one that fails is not used again."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(WORKERS)
        self._guard = threading.Lock()
        self._idle: list[_Worker] = []

    def ask(self, request: bytes) -> dict[str, Any]:
        with self._places:
            worker = self._take() or _Worker()
            try:
                answer = worker.ask(request)
            except _LostError as lost:
                worker.stop()
                raise ChatTemplateError(f"the chat template was stopped: {lost}") from lost
            except BaseException:
                worker.stop()
                raise
            with self._guard:
                self._idle.append(worker)
            return answer

    def prepare(self) -> None:
        """Have one idle worker, if there is a place for it. One that cannot be started is for `ask` to complain of."""
        if not self._places.acquire(blocking=False):
            return
        try:
            with self._guard, contextlib.suppress(OSError):
                if not self._idle:
                    self._idle.append(_Worker())
        finally:
            self._places.release()

    def _take(self) -> _Worker | None:
        """An idle worker, if there is one; those that ended while idle (the system was short of memory) go."""
        while True:
            with self._guard:
                if not self._idle:
                    return None
                worker = self._idle.pop()
            if worker.runs():
                return worker
            worker.stop()

    def close(self) -> None:
        with self._guard:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.stop()


def _wait(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise _LostError(f"it took longer than {DEADLINE:g} s")


def _forget() -> None:
    """In a forked child the parent's workers are the parent's."""
    global _POOL
    _POOL = _Pool()


_POOL = _Pool()
atexit.register(lambda: _POOL.close())
os.register_at_fork(after_in_child=_forget)
