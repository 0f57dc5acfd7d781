"""Result records: one JSON object per measurement, appended to a file that is never rewritten.

A record says what was measured (model), by what (engine), on what (machine), how (protocol), and what came out
(results). Knows nothing of how results are obtained, and reads no records: reports do.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .. import __version__, settings
from ..checkpoint.memory import total_memory
from ..errors import UsageError

if TYPE_CHECKING:
    from ..checkpoint.base import Checkpoint

SCHEMA = 1
Record: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal["eval", "bench", "compress", "load", "soak"]

_ISA = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "vnni",
    "avx_vnni": "avxvnni",
    "avx512_bf16": "bf16",
    "amx_tile": "amx",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
}
"""Processor flags that matter to matrix products, and the short words that a record uses for them."""


def make_record(
    kind: Kind,
    *,
    model: Mapping[str, Any],
    engine: Mapping[str, Any],
    protocol: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
    error: str | None = None,
    threads: int | None = None,
) -> Record:
    """A whole record; with `error` it is marked failed and has no results."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "status": "ok" if error is None else "failed",
        "error": error,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": dict(model),
        "engine": dict(engine),
        "machine": machine_block(threads),
        "protocol": dict(protocol),
        "results": dict(results or {}) if error is None else {},
    }


def model_block(checkpoint: Checkpoint) -> Record:
    """What a record says about a model; reads the whole model once for its fingerprint (cached)."""
    manifest = checkpoint.manifest or {}
    base = manifest.get("base") or {}
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "fingerprint": checkpoint.fingerprint(),
        "base": base.get("name"),
        "base_fingerprint": base.get("fingerprint"),
        "recipe": (manifest.get("recipe") or {}).get("name"),
        "note": checkpoint.source_note,
        "parameters": checkpoint.parameters(),
        "weight_bytes": checkpoint.weight_bytes(),
        "bits_per_weight": round(checkpoint.bits_per_weight(), 4),
        "format": _main_format(checkpoint),
    }


def _main_format(checkpoint: Checkpoint) -> str:
    """The format that holds most of the weights, such as `bf16` or `int4-g64`."""
    weights: Counter[str] = Counter()
    for name in checkpoint.names():
        weights[checkpoint.format(name).name] += math.prod(checkpoint.shape(name))
    return weights.most_common(1)[0][0]


def unknown_model_block(name: str) -> Record:
    """The model block of a failed record whose model could not even be opened."""
    facts = ("path", "fingerprint", "base", "base_fingerprint", "recipe", "note")
    numbers = ("parameters", "weight_bytes", "bits_per_weight", "format")
    return {"name": name, **dict.fromkeys((*facts, *numbers))}


def engine_block(
    dtype: str = "float32",
    backend: str | None = "reference",
    kernels: str | None = None,
    activations: str | None = None,
    kv_cache: str | None = None,
) -> Record:
    """What a record says about Gossamer's own engine; `kernels` names their instruction set. None: unknown."""
    return {
        "name": "gossamer",
        "backend": backend,
        "version": __version__,
        "dtype": dtype,
        "kernels": kernels,
        "activations": activations,
        "kv_cache": kv_cache,
    }


def machine_block(threads: int | None = None) -> Record:
    """The machine as this process sees it; `threads` defaults to settings.threads()."""
    return {
        "cpu": _cpu_name(),
        "isa": isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": settings.threads() if threads is None else threads,
        "memory_bytes": total_memory(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
    }


def isa() -> str:
    """The instruction sets that matter here, such as `avx2+avx512+vnni+bf16`, or the architecture's name."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return "+".join(short for flag, short in _ISA.items() if flag in flags) or platform.machine()


def check_writable(path: str | Path) -> None:
    """Open the file that records will be appended to, and make it if absent, so that no work is done for nothing.

    Raises UsageError naming the path.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder", hint="name a .jsonl file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(_open(path))
    except OSError as error:
        raise UsageError(f"{path}: records cannot be written there: {error.strerror or error}") from error


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one line with one write and fsync it, so that runs in parallel never mix. Refuses NaN (ValueError)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    handle = _open(path)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line  # a line cut off by a crash must not swallow this one
        if os.write(handle, line) != len(line):
            raise OSError(f"{path}: the record was written only in part")
        os.fsync(handle)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
