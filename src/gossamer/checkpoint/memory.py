"""How much memory this process may take, now and ever, and the check made before taking a lot of it."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import DoesNotFit

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Version 1 of control groups writes "no limit" as a number near 2**63."""


def available_memory() -> int:
    """Bytes that may still be taken: what the machine has left, or what a control group allows if that is less."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())]))


def total_memory() -> int:
    """Bytes that this process could ever use: the machine's, or a control group's limit if that is less."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def require_memory(needed: int, what: str, hint: str) -> None:
    """Raise DoesNotFit, with both numbers, unless `needed` bytes are available."""
    available = available_memory()
    if needed > available:
        raise DoesNotFit(f"{what} takes {needed / 1e6:,.1f} MB, but {available / 1e6:,.1f} MB are available", hint=hint)


def _limits() -> list[tuple[int, int]]:
    """(limit, used) of every control group (v1 or v2) above this process that limits memory."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = ROOT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        while folder.is_relative_to(base):  # a limit on any ancestor binds too
            found += _limit_of(folder, *names)
            folder = folder.parent
    return found


def _limit_of(folder: Path, limit_name: str, usage_name: str, reclaimable: str) -> list[tuple[int, int]]:
    """[(limit, used)] of one group, or [] if it sets none; file cache that is given back on demand is not used."""
    limit, used = _number(folder / limit_name), _number(folder / usage_name)
    if limit is None or used is None or limit >= UNLIMITED:
        return []
    try:
        stat = (folder / "memory.stat").read_text()
    except OSError:
        stat = ""
    cache = re.search(rf"^{reclaimable} (\d+)$", stat, re.MULTILINE)
    return [(limit, max(0, used - (int(cache[1]) if cache else 0)))]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
