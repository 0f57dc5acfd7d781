"""What this machine can do at most: read memory that no cache holds, and multiply on registers. Knows no torch."""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from . import cpu

HUGE_PAGE = 2 << 20
READ_BYTES = 256 << 20
BURST_SECONDS = 0.01
"""So long that starting the threads does not count."""


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


def read_limit(threads: int, times: int = 5) -> float:
    """Bytes per second that so many threads read, the best of some readings. Raises KernelError without the kernels."""
    memory = huge_array(READ_BYTES)
    return max(bytes_per_second(memory, threads, 1) for _ in range(times))


def product_limit(threads: int, integer: bool, times: int = 5) -> float:
    """Products and sums per second of all threads, of bytes or of floats, the best of some bursts."""
    extension, rounds = cpu.extension(), 1 << 16
    with ThreadPoolExecutor(threads) as pool:

        def burst() -> tuple[float, int]:
            began = time.perf_counter()
            work = sum(pool.map(lambda _: int(extension.peak_products(integer, rounds)), range(threads)))
            return time.perf_counter() - began, work

        while burst()[0] < BURST_SECONDS:
            rounds *= 4
        return max(work / seconds for seconds, work in (burst() for _ in range(times)))
