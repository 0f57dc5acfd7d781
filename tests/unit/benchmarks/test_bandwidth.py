"""What read bandwidth is measured on is memory of its own, in whole huge pages."""

from __future__ import annotations

from bandwidth import HUGE_PAGE, bytes_per_second, huge_array


def test_an_array_begins_on_a_huge_page_and_is_written() -> None:
    array = huge_array(3 * HUGE_PAGE)
    assert array.ctypes.data % HUGE_PAGE == 0
    assert array.shape == (3 * HUGE_PAGE,)
    assert bool((array == 1).all())
    assert bytes_per_second(array, threads=2, times=2) > 0
