"""How much memory this process may still take, and the check made before taking a lot of it."""

from __future__ import annotations

from pathlib import Path

from ..errors import DoesNotFit

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that may still be taken: what the machine has left, or what the control group allows if that is less."""
    import psutil

    machine = int(psutil.virtual_memory().available)
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None:  # version 1 of control groups
        limit = _number(_CGROUP / "memory/memory.limit_in_bytes")
        used = _number(_CGROUP / "memory/memory.usage_in_bytes")
    if limit is None or used is None:
        return machine
    return min(machine, max(limit - used + _reclaimable(), 0))


def require_memory(needed: int, what: str, hint: str) -> None:
    """Raise DoesNotFit, with both numbers, unless `needed` bytes are available."""
    available = available_memory()
    if needed > available:
        raise DoesNotFit(f"{what} takes {needed / 1e6:,.0f} MB, but {available / 1e6:,.0f} MB are available", hint=hint)


def _reclaimable() -> int:
    """Page cache that counts as used by the control group but is given back on demand."""
    for name in ("memory.stat", "memory/memory.stat"):
        try:
            lines = (_CGROUP / name).read_text().splitlines()
        except OSError:
            continue
        return sum(int(n) for key, _, n in (line.partition(" ") for line in lines) if key == "inactive_file")
    return 0


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
