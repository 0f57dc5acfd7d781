"""llama.cpp's server, started for a few prompts of token ids and stopped again."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ...errors import ExportError

SECONDS = 300.0
CONTEXT = 2048


def answer(program: str, path: Path, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[str, list[list[int]]]:
    """Version, and greedy tokens after each prompt. Raises ExportError with what the server said if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        port = _free_port()
        options = ["--host", "127.0.0.1", "--port", port, "-c", CONTEXT, "-t", 1, "-np", 1, "--no-webui"]
        command = [program, "-m", path, *options]
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            _wait(process, port, log)
            build = _ask(port, "/props")["build_info"]
            return build, [_complete(port, prompt, tokens) for prompt in prompts]
        except OSError as error:
            raise ExportError(f"{program} does not answer for {path}: {error}\n  {_tail(log)}") from error
        finally:
            process.kill()
            process.wait()


def _complete(port: int, prompt: Sequence[int], tokens: int) -> list[int]:
    body = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0.0, "samplers": ["top_k"], "top_k": 1}
    answer = _ask(port, "/completion", {**body, "ignore_eos": True, "cache_prompt": False, "return_tokens": True})
    found: list[int] = answer["tokens"]
    return found


def _ask(port: int, where: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{where}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=SECONDS) as response:
        found: dict[str, Any] = json.load(response)
    return found


def _wait(process: subprocess.Popen[bytes], port: int, log: IO[str]) -> None:
    """Until the model is loaded. Raises ExportError if the server ends, or takes too long."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ExportError(f"llama-server cannot load the file: {_tail(log)}")
        try:
            _ask(port, "/health")
            return
        except OSError:
            time.sleep(0.1)
    raise ExportError(f"llama-server took longer than {SECONDS:.0f} s to load the file")


def _tail(log: IO[str]) -> str:
    log.seek(0)
    lines = [line for line in log.read().splitlines() if "error" in line.lower() or "failed" in line.lower()]
    return "\n  ".join(lines[-4:])[:1000]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
