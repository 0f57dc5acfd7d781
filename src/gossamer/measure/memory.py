"""What the operating system says about memory: of this process, and what is left on the machine.

RSS counts every resident page of the process, shared libraries included; its peak is kept by the kernel itself
(VmHWM, to some dozen pages), so nothing is sampled and no spike is missed. Differences of RSS are taken within one
process. PSS divides shared pages among those who map them, so it moves when a *neighbour* starts: it is read for
interest, never for a difference. Knows no models. Outside Linux, psutil answers and PSS equals RSS.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2**63."""


@dataclass(frozen=True)
class Usage:
    """Bytes of this process: resident, and resident with shared pages divided among their users."""

    rss: int
    pss: int


def read_usage(settle: bool = False) -> Usage:
    """Memory of this process now; `settle` first collects garbage and gives free heap pages back."""
    if settle:
        _release_free_pages()
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return _portable_usage()
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.MULTILINE))
    return Usage(rss=int(fields["Rss"]) * 1024, pss=int(fields["Pss"]) * 1024)


def peak_rss() -> int:
    """Bytes of the highest RSS that this process ever had."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory() -> int:
    """Bytes of memory that this process could ever use: the machine's, or less if a cgroup says so."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _cgroup_limits())])


def available_memory() -> int:
    """Bytes that can be taken now without swapping: the machine's, or less if a cgroup (v1, v2, any level) says so."""
    free = [_meminfo("MemAvailable"), *(limit - used for limit, used in _cgroup_limits())]
    return max(0, min(free))


def _release_free_pages() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _portable_usage() -> Usage:
    import psutil

    rss = int(psutil.Process().memory_info().rss)
    return Usage(rss, rss)


def _meminfo(field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.total if field == "MemTotal" else memory.available)


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used without reclaimable file cache) of each cgroup above this process that limits memory."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        while folder.is_relative_to(base):  # a limit on any ancestor binds too
            found += _limit_of(folder, *names)
            folder = folder.parent
    return found


def _limit_of(folder: Path, limit_name: str, usage_name: str, reclaimable: str) -> list[tuple[int, int]]:
    """[(limit, used)] of one cgroup, or [] if it sets none."""
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= UNLIMITED:
            return []
        used = int((folder / usage_name).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return []
    cache = re.search(rf"^{reclaimable} (\d+)$", stat, re.MULTILINE)
    return [(int(limit), max(0, used - (int(cache[1]) if cache else 0)))]
