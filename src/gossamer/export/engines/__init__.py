"""Other engines, each in a process of its own, answering prompts greedily. Knows no model and no format.

An engine is a Python that has its package (a file of this folder runs there and imports nothing of ours), or
llama.cpp's server. A worker takes one JSON object on stdin, {"path", "prompts", "tokens"}, and the last line that it
prints is another, {"version", "tokens"}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import ExportError
from . import llama_cpp
from .llama_cpp import UNPROVED

PACKAGES = {"transformers": "transformers", "vllm": "vllm", "gptqmodel": "gptqmodel", "openvino": "openvino_genai"}
"""Engine -> the package that its Python must have."""
ENVIRONMENT = {
    "vllm": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
}
"""What an engine is told besides; one process, so that its errors are seen here."""
OPENMP = "lib/libiomp5.so"
"""In the environment of vLLM's CPU build, which wants it loaded first."""
MINUTES = 30.0
PROBE_SECONDS = 60.0
"""That a Python may take to say whether it has a package."""


@dataclass(frozen=True)
class Answers:
    """What an engine said to each prompt."""

    engine: str
    """With its version."""
    tokens: list[list[int]]


class _Said(BaseModel):
    """What a worker prints last."""

    model_config = ConfigDict(strict=True)
    version: str
    tokens: list[list[int]]


@dataclass(frozen=True)
class Engine:
    """An engine that is there."""

    name: str
    program: str
    """Its Python, or llama.cpp's server."""

    def answer(self, path: Path, prompts: Sequence[Sequence[int]], tokens: int) -> Answers:
        """Greedy tokens after each prompt. Raises ExportError with what the engine said if it fails."""
        if self.name == "llama.cpp":
            version, answers = llama_cpp.answer(self.program, path, prompts, tokens)
        else:
            request = {"path": str(path.resolve()), "prompts": [list(p) for p in prompts], "tokens": tokens}
            said = _run(self, request)
            version, answers = said.version, said.tokens
        return Answers(f"{self.name} {version}", answers)


def find(name: str, python: Path | None = None, llama_cpp_folder: Path | None = None) -> Engine | None:
    """The engine where it is installed: `python`'s environment or ours, llama.cpp's folder or PATH; else None.

    Raises ExportError for a Python or a folder that was named and cannot have it.
    """
    if name == "llama.cpp":
        if python is not None:
            raise ExportError(
                f"llama.cpp is a program, and no Python such as {python} runs it",
                hint="--llama-cpp names the folder of llama-server; leave out --engine",
            )
        if llama_cpp_folder is not None and not llama_cpp_folder.is_dir():
            raise ExportError(
                f"{llama_cpp_folder} is no folder", hint="--llama-cpp names the one of llama-server and llama-quantize"
            )
        found = shutil.which("llama-server", path=None if llama_cpp_folder is None else str(llama_cpp_folder))
        return None if found is None else Engine(name, found)
    if python is not None:
        if not _has(python, PACKAGES[name]):
            raise ExportError(
                f"{python} is no Python that has {PACKAGES[name]}",
                hint="--engine names the Python of an environment where it is installed, such as ENV/bin/python",
            )
        return Engine(name, str(python))
    return None if importlib.util.find_spec(PACKAGES[name]) is None else Engine(name, sys.executable)


def _has(python: Path, package: str) -> bool:
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # it is no program, or none that answers
        return False
    return done.returncode == 0


def _run(engine: Engine, request: dict[str, Any]) -> _Said:
    script = Path(__file__).with_name(f"{engine.name}_worker.py")
    environment = {**os.environ, "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= ENVIRONMENT.get(engine.name, {})
    openmp = Path(engine.program).parent.parent / OPENMP
    if engine.name == "vllm" and openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    try:
        done = subprocess.run(
            [engine.program, "-P", str(script)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=MINUTES * 60,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"{engine.name} took longer than {MINUTES:g} minutes on {request['path']}", hint=UNPROVED
        ) from error
    if done.returncode:
        said = "\n  ".join(done.stderr.strip().splitlines()[-4:]) or "nothing"
        raise ExportError(f"{engine.name} cannot run {request['path']}: {said[:2000]}", hint=UNPROVED)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return _Said.model_validate_json(last)
    except ValidationError as error:
        raise ExportError(
            f"{engine.name} in {engine.program} answered {last[:80]!r} for {request['path']}, which are no tokens",
            hint=UNPROVED,
        ) from error
