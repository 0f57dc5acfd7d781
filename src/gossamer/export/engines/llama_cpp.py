"""llama.cpp's server, started for a few prompts of token ids and stopped again."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ValidationError

from ...errors import ExportError

SECONDS = 300.0
CONTEXT = 2048
UNPROVED = "--no-verify writes it all the same: nothing is read back or run then, and the manifest says so"
"""The way out where an engine fails."""


class _Props(BaseModel):
    build_info: str


class _Completion(BaseModel):
    tokens: list[int]


def answer(program: str, path: Path, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[str, list[list[int]]]:
    """Version, and greedy tokens after each prompt. Raises ExportError with what the server said if it fails."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        port = _free_port()
        process = _start(program, path, port, log)
        try:
            failure = _wait(process, port)
            if failure is None:
                build = _Props.model_validate_json(_ask(port, "/props")).build_info
                return build, [_complete(port, prompt, tokens) for prompt in prompts]
        except (OSError, HTTPException) as error:
            failure = f"does not answer as llama-server does: {error}"
        except ValidationError as error:
            failure = f"does not answer as llama-server does: {error.errors()[0]['msg']}"
        finally:
            process.kill()
            process.wait()
        raise ExportError(f"{program} {failure}\n  {path}: it said {_tail(log)}", hint=UNPROVED)


def _start(program: str, path: Path, port: int, log: IO[str]) -> subprocess.Popen[bytes]:
    options = ["--host", "127.0.0.1", "--port", port, "-c", CONTEXT, "-t", 1, "-np", 1, "--no-webui"]
    command = [str(word) for word in (program, "-m", path, *options)]
    try:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ExportError(f"{program} cannot be started: {error.strerror}", hint=UNPROVED) from error


def _complete(port: int, prompt: Sequence[int], tokens: int) -> list[int]:
    body = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0.0, "samplers": ["top_k"], "top_k": 1}
    answer = _ask(port, "/completion", {**body, "ignore_eos": True, "cache_prompt": False, "return_tokens": True})
    return _Completion.model_validate_json(answer).tokens


def _ask(port: int, where: str, body: dict[str, Any] | None = None) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{where}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=SECONDS) as response:
        found: bytes = response.read()
    return found


def _wait(process: subprocess.Popen[bytes], port: int) -> str | None:
    """Until the model is loaded: then None, or what is wrong if the server ends or takes too long."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            return f"cannot load the file: it ended with code {process.returncode}"
        try:
            _ask(port, "/health")
            return None
        except OSError:
            time.sleep(0.1)
    return f"took longer than {SECONDS:g} s to load the file"


def _tail(log: IO[str]) -> str:
    """The last lines that tell of an error, or else the last ones."""
    log.seek(0)
    lines = log.read().splitlines()
    telling = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or lines
    return "\n  ".join(telling[-4:])[:1000] or "nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
