"""What the operating system says about the memory of this process.

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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


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


def peak_rss(others: Iterable[int] = ()) -> int:
    """Bytes of the highest RSS that this process ever had, and of those that each of some others had."""
    return _peak("self") + sum(_peak(str(pid)) for pid in others)


def _peak(pid: str) -> int:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    if pid != "self":
        import psutil

        return int(psutil.Process(int(pid)).memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
