"""The servers of the benchmark, each started as its own documentation advises, alone, on a free port of the loopback.

A server is started for each sample and ended after it: nothing that it remembers of one sample is there in the next,
and nothing of it waits on a core while another is measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpu_models
import peers
from cpu_sides import LOAD_SECONDS, Failed
from gossamer import __version__
from gossamer.settings import cache_dir
from serve_rows import GOSSAMER, LLAMA_SERVER, VLLM, Side

SEQUENCES = 64
CONTEXT = 2048
"""Tokens that a sequence may have: the longest prompt behind its prefix, and its answer."""
SLOT = 1024
"""The same for llama-server, whose memory is cut into slots beforehand: 512 + 256 tokens fit with room."""
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Variant:
    """One way to start a server: what is added to its command line and environment."""

    name: str
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


VARIANTS: dict[str, tuple[Variant, ...]] = {
    GOSSAMER: (Variant("defaults"),),
    # One buffer for all sequences (--kv-unified) has every token look at every other's cells: not tried.
    LLAMA_SERVER: (
        Variant("flash attention", ("-fa", "on")),
        Variant("no flash attention", ("-fa", "off")),
        Variant("flash attention, batches of 2048", ("-fa", "on", "-ub", "2048")),
        Variant("flash attention, few HTTP threads", ("-fa", "on", "--threads-http", "8")),
    ),
    VLLM: (
        Variant("all cores compute"),
        Variant("one core for HTTP", environment={"VLLM_CPU_OMP_THREADS_BIND": "FIRST", "OMP_NUM_THREADS": "1"}),
        Variant("no prefix caching", ("--no-enable-prefix-caching",)),
    ),
}
"""What is tried for each server; the fastest on a short load is what it runs with. Ours runs as it comes."""
VERSIONS = {GOSSAMER: __version__, LLAMA_SERVER: f"of {peers.LLAMA_CPP}", VLLM: peers.VLLM}


def make(server: str) -> None:
    """Make a server's program if it is not there. Raises CalledProcessError."""
    if server != GOSSAMER:
        peers.folder_of(server)


@contextlib.contextmanager
def running(side: Side, variant: Variant, threads: int) -> Iterator[str]:
    """The URL of a server that answers, as long as this lasts. Raises Failed."""
    port = free_port()
    with answering(*launch(side, variant, port, threads), port, f"serve-{side.server}-{side.model}") as url:
        yield url


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def answering(command: list[str], environment: dict[str, str], port: int, name: str) -> Iterator[str]:
    """The URL of a server that answers on this port, as long as this lasts; its log has this name. Raises Failed."""
    log = cache_dir("bench", "logs") / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **environment},
            start_new_session=True,  # a group of its own: signals reach its children and nobody else
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log)
        yield url
    finally:
        _end(process)


def launch(side: Side, variant: Variant, port: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a server."""
    path = cpu_models.path_of(side.model)
    words: list[Any]
    if side.server == GOSSAMER:
        words = [sys.executable, "-m", "gossamer", "serve", path, "--port", port, "--max-sequences", SEQUENCES]
        words += ["--kv-memory", "2GiB", "--quiet"]
        environment = {"GOSSAMER_THREADS": str(threads)}
    elif side.server == LLAMA_SERVER:
        words = [peers.llama_server(), "-m", path, "--host", "127.0.0.1", "--port", port, "-t", threads, "-tb", threads]
        words += ["-np", SEQUENCES, "-c", SEQUENCES * SLOT, "--no-kv-unified", "--cache-ram", 0, "--no-webui"]
        environment = {}
    else:
        words = [peers.python_of(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", path]
        words += ["--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16", "--max-model-len", CONTEXT]
        words += ["--max-num-seqs", SEQUENCES, "--disable-uvicorn-access-log"]
        environment = _vllm_environment(threads)
    cores = sorted(os.sched_getaffinity(0))
    added = {name: value.replace("FIRST", str(cores[0])) for name, value in variant.environment.items()}
    return [str(word) for word in (*words, *variant.options)], {**environment, **added}


def _vllm_environment(threads: int) -> dict[str, str]:
    """As its installation guide asks: Intel's OpenMP loaded first, threads bound to cores."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    openmp = peers.python_of(VLLM).parent.parent / "lib" / "libiomp5.so"
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CACHE_ROOT": str(cache_dir("bench", "vllm")),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
    }


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server says that it is well. Raises Failed."""
    deadline = time.monotonic() + LOAD_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(_last_words(log))
        if _answers(url):
            return
        time.sleep(0.2)
    raise Failed(f"no server within {LOAD_SECONDS:.0f} s")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and after some seconds SIGKILL, to the group of a server."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"ended: {lines[-1][:300]}" if lines else "ended without a word"
