"""The process of a peer: loads a model once in the peer's own Python, then makes one timed run for each line it gets.

    PYTHON loop.py ENGINE PARENT_PID

ENGINE is a file beside this one. The lines are those of ../worker.py: a job, then a request for each value. Run as a
script by Pythons that have nothing of this package: imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
LONGEST_MESSAGE = 500
_PR_SET_PDEATHSIG = 1


class MissingLibraryError(Exception):
    """This Python has not what the engine needs; `hint` is the way out."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def work(engine: ModuleType, job: dict[str, Any], send: Callable[..., None]) -> Iterator[dict[str, Any] | None]:
    """Load, one run for each of `job["prompts"]`, and at last what was measured; nll where windows are given."""
    memory = load_file("gossamer_memory", HERE.parent / "memory.py")
    _import(engine.LIBRARIES, job["install"])
    bare = memory.read_usage(settle=True).rss
    began = time.perf_counter()
    model = engine.Engine(job)
    load_s = time.perf_counter() - began
    send(event="fact", name="engine", value={"version": _version(engine), **model.facts})
    loaded = memory.read_usage(settle=True).rss
    yield None
    timings = []
    for prompts in job["prompts"]:
        timings.append(model.run(prompts, job["output_tokens"]))
        yield None
    found = {
        "timings": timings,
        "bare_bytes": bare,
        "rm_weights_bytes": max(0, loaded - bare),
        "rm_peak_bytes": memory.peak_rss(),
        "rm_reserved_bytes": model.reserved_bytes,
        "kv_element_bytes": model.facts["kv_element_bytes"],
        "load_s": load_s,
    }
    yield {**found, "judged": _judge(model, job, send)}


def _judge(model: Any, job: dict[str, Any], send: Callable[..., None]) -> dict[str, Any] | None:
    """{"nll", "seconds"} over all windows, or {"error"}: figures of speed are not lost with it. None: not asked for."""
    windows, nll, began = job["windows"], 0.0, time.perf_counter()
    if not windows:
        return None
    try:
        for done, window in enumerate(windows):
            send(event="progress", label="judging", done=done, total=len(windows))
            nll += model.nll(window, job["scored"])
        if not math.isfinite(nll):
            raise ArithmeticError(f"its log-likelihoods add up to {nll}")
    except Exception as error:
        traceback.print_exc()
        return {"error": describe(error)}
    return {"nll": nll / (len(windows) * job["scored"]), "seconds": time.perf_counter() - began}


def serve(engine: ModuleType) -> None:
    """Read one job from stdin, then answer each further line with its next value, until one fails or there is none."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the answers

    def send(**event: Any) -> None:
        answers.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        answers.flush()

    values = work(engine, json.loads(sys.stdin.readline())["arguments"], send)
    for _ in sys.stdin:
        try:
            answer = {"event": "value", "value": next(values)}
        except StopIteration:
            answer = {"event": "end"}
        except Exception as error:
            traceback.print_exc()
            answer = {"event": "error", **describe(error)}
        send(**answer)
        if answer["event"] != "value":
            return


def describe(error: Exception) -> dict[str, Any]:
    """An exception as the parent reads it."""
    kind = "EngineMissing" if isinstance(error, MissingLibraryError) else type(error).__name__
    message = " ".join(str(error).split())[:LONGEST_MESSAGE] or "no message"
    return {"kind": kind, "message": message, "hint": getattr(error, "hint", None) if kind == "EngineMissing" else None}


def load_file(name: str, path: Path) -> ModuleType:
    """A module from a file, whatever else has its name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import(names: tuple[str, ...], install: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingLibraryError(f"{sys.executable} cannot import {name}: {error}", install) from error


def _version(engine: ModuleType) -> str | None:
    found = getattr(sys.modules[engine.LIBRARIES[-1]], "__version__", None)
    return None if found is None else str(found)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent is gone (Linux; elsewhere the end of stdin has to do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    _die_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The files beside this one are called like the libraries that they are about.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    serve(load_file("gossamer_engine", HERE / f"{sys.argv[1]}.py"))
