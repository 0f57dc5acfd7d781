"""A server over a fake engine in a process of its own, and what tests ask of it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

FAKE = Path(__file__).with_name("fake_server.py")
PATIENCE = 120.0
"""Seconds until a test gives up; nothing is measured by it."""


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """What a condition gives once it holds."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)
    return found


class Server:
    """`fake_server.py` with these options (or another command), ready to be asked."""

    def __init__(self, *options: object, command: tuple[str, ...] = (sys.executable, str(FAKE))) -> None:
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self.process = subprocess.Popen(
            [*command, *map(str, options)], stdout=subprocess.PIPE, stderr=self.stderr, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = line.rpartition(" ")[2].strip()
        assert self.url.startswith("http"), f"{line}{self.said()}"
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx2.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            psutil.wait_procs(children, PATIENCE)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.stderr.close()

    def said(self) -> str:
        """What it wrote on stderr."""
        self.stderr.seek(0)
        return self.stderr.read()

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, content: str = "abc", **fields: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", chat_body(content, **fields))

    def complete(self, prompt: Any = "abc", **fields: Any) -> httpx2.Response:
        return self.post("/v1/completions", {"model": "fake", "prompt": prompt, "temperature": 0, **fields})

    def events(self, path: str, body: Any) -> Iterator[str]:
        """The data of each event of a stream, as it comes."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            yield from data_lines(response)

    def metrics(self) -> dict[str, float]:
        """Name -> value, over all models; a counter's finished reason stands behind its name."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                name = sample.name.removeprefix("gossamer:")
                if "finished_reason" in sample.labels:
                    name = f"{name}/{sample.labels['finished_reason']}"
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def is_idle(self) -> bool:
        """True if the engine holds nothing."""
        now = self.metrics()
        return not (now["num_requests_running"] or now["num_requests_waiting"] or now["kv_cache_usage_perc"])

    def workers(self) -> list[psutil.Process]:
        """Its engine workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "gossamer.serve.worker" in " ".join(_command(child))]

    def send(self, path: str, body: Any) -> socket.socket:
        """Send a request and leave it at that."""
        data = json.dumps(body).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        sock.sendall(request_head(path, len(data)) + data)
        return sock

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def chat_body(content: str = "abc", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def long_body(prompt: str = "abc", tokens: int = 900, **fields: Any) -> dict[str, Any]:
    """A completion that takes a while."""
    said = {"model": "fake", "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return {**said, **fields}


def request_head(path: str, length: int, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def data_lines(response: httpx2.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _command(process: psutil.Process) -> list[str]:
    try:
        found: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return found
