"""How fast the kernels' own threads read memory that no cache holds: what shares of the read bandwidth are taken of."""

from __future__ import annotations

import mmap
import time

import numpy as np
from numpy.typing import NDArray

from gossamer.kernels import cpu

HUGE_PAGE = 2 << 20


def huge_array(size: int) -> NDArray[np.uint8]:
    """Ones [size], in pages of 2 MB where the system has them.

    The engine's weights lie in such pages. From small ones a core reads more slowly, so that a share of what it reads
    there would look better than it is.
    """
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    everything = np.frombuffer(memory, np.uint8)
    skip = -everything.ctypes.data % HUGE_PAGE
    array = everything[skip : skip + size]
    array.fill(1)  # pages that nobody has written are all the same one
    return array


def bytes_per_second(memory: NDArray[np.uint8], threads: int, times: int) -> float:
    """Rate at which an array is read, over so many readings of all of it."""
    started = time.perf_counter()
    for _ in range(times):
        cpu.read_bytes(memory, threads)
    return times * memory.nbytes / (time.perf_counter() - started)
