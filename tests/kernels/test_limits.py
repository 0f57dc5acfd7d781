"""What read bandwidth is measured on is memory of its own, in whole huge pages; limits are rates."""

from __future__ import annotations

import pytest

from gossamer.kernels import limits
from gossamer.kernels.limits import HUGE_PAGE, bytes_per_second, huge_array, product_limit, read_limit


def test_an_array_begins_on_a_huge_page_and_is_written() -> None:
    array = huge_array(3 * HUGE_PAGE)
    assert array.ctypes.data % HUGE_PAGE == 0
    assert array.shape == (3 * HUGE_PAGE,)
    assert bool((array == 1).all())
    assert bytes_per_second(array, threads=2, times=2) > 0


def test_limits_are_what_a_clock_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second at each look: a reading takes one, a burst one."""
    seconds = iter(range(1000))
    monkeypatch.setattr(limits.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(limits, "READ_BYTES", 2 * HUGE_PAGE)
    assert read_limit(threads=1, times=2) == 2 * HUGE_PAGE
    one, two = (product_limit(threads, integer=True, times=1) for threads in (1, 2))
    assert two == 2 * one > 0
