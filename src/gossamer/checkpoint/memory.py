"""How much memory this process may still take, and the check made before taking a lot of it."""

from __future__ import annotations

from pathlib import Path

from ..errors import DoesNotFit

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that may still be taken: what the machine has left, or what a control group allows if that is less."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups(ROOT, MEMBERSHIP)]))


def require_memory(needed: int, what: str, hint: str) -> None:
    """Raise DoesNotFit, with both numbers, unless `needed` bytes are available."""
    available = available_memory()
    if needed > available:
        raise DoesNotFit(f"{what} takes {needed / 1e6:,.1f} MB, but {available / 1e6:,.1f} MB are available", hint=hint)


def _left_in_groups(root: Path, membership: Path) -> list[int]:
    """Bytes left in every control group above this process that has a limit; file cache counts as free."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in {"", "memory"}:  # version 2, or the memory controller of version 1
            top = root / controllers
            group = top / path.lstrip("/")
            left += [_left(folder) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return [n for n in left if n is not None]


def _left(group: Path) -> int | None:
    """Bytes left in one control group, or None if it has no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is not None and used is not None:
            return limit - used + _file_cache(group)
    return None


def _file_cache(group: Path) -> int:
    """Page cache that counts as used, but is given back when memory is asked for."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
