"""The journal: what is done stays done, and nothing else is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.checkpoint.journal import NAME, Journal, differences
from gossamer.errors import ResumeMismatch

HEADER = {"model": "abc", "recipe": {"stages": [{"bits": 4}]}}


def finished(folder: Path, count: int) -> Journal:
    journal = Journal(folder, HEADER)
    for i in range(count):
        file = folder / f"unit-{i}"
        file.write_bytes(bytes([i]) * 100)
        journal.add(f"unit-{i}", file, {"layers": [i]})
    return journal


def test_finished_units_are_found_again(tmp_path: Path) -> None:
    finished(tmp_path, 3)
    again = Journal(tmp_path, HEADER)
    assert list(again.done) == ["unit-0", "unit-1", "unit-2"]
    assert again.done["unit-1"]["notes"] == {"layers": [1]}


def test_a_line_cut_off_by_a_kill_is_a_unit_not_done(tmp_path: Path) -> None:
    finished(tmp_path, 2)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-7])
    again = Journal(tmp_path, HEADER)
    assert list(again.done) == ["unit-0"]
    again.add("unit-1", tmp_path / "unit-1", {"layers": [1]})
    assert list(Journal(tmp_path, HEADER).done) == ["unit-0", "unit-1"]


def test_another_recipe_stops_and_is_named(tmp_path: Path) -> None:
    finished(tmp_path, 1)
    with pytest.raises(ResumeMismatch, match=r"recipe\.stages\[0\]\.bits was 4, is now 3"):
        Journal(tmp_path, {"model": "abc", "recipe": {"stages": [{"bits": 3}]}})


def test_a_damaged_line_stops_and_is_named(tmp_path: Path) -> None:
    finished(tmp_path, 2)
    path = tmp_path / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(ResumeMismatch, match="line 2 is damaged"):
        Journal(tmp_path, HEADER)


@pytest.mark.parametrize(("old", "new"), [(b'"layers": [1]', b'"layers": [2]'), (b'"notes"', b'"nodes"')])
def test_a_note_that_changed_stops_and_is_named(tmp_path: Path, old: bytes, new: bytes) -> None:
    finished(tmp_path, 2)
    path = tmp_path / NAME
    assert path.read_bytes().count(old) >= 1
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(old, new)]))
    with pytest.raises(ResumeMismatch, match="line 3 is damaged"):
        Journal(tmp_path, HEADER)


def test_the_first_difference_in_the_headers_own_order_is_named(tmp_path: Path) -> None:
    Journal(tmp_path, {"recipe": {"seed": 0}, "calibration": "aa"})
    with pytest.raises(ResumeMismatch, match=r"recipe\.seed was 0, is now 1"):
        Journal(tmp_path, {"recipe": {"seed": 1}, "calibration": "bb"})


def test_a_unit_file_that_changed_stops_and_is_named(tmp_path: Path) -> None:
    finished(tmp_path, 2)
    (tmp_path / "unit-1").write_bytes(b"other")
    with pytest.raises(ResumeMismatch, match="unit-1"):
        Journal(tmp_path, HEADER)


def test_differences_name_every_place() -> None:
    was, now = {"a": 1, "b": [1, {"c": 2}], "d": 0}, {"a": 1, "b": [1, {"c": 3}], "e": 0}
    assert {p for p, _, _ in differences(was, now)} == {"b[1].c", "d", "e"}


def test_a_unit_recorded_again_counts_once_and_its_earlier_file_goes(tmp_path: Path) -> None:
    journal = finished(tmp_path, 2)
    for step in (1, 2):
        file = tmp_path / f"state-{step}"
        file.write_bytes(bytes(step))
        journal.add("state", file, {"step": step})
    assert [p.name for p in sorted(tmp_path.glob("state-*"))] == ["state-2"]
    again = Journal(tmp_path, HEADER)
    assert again.done["state"]["notes"] == {"step": 2}
    (tmp_path / "state-2").write_bytes(b"other")
    with pytest.raises(ResumeMismatch, match="state-2"):
        Journal(tmp_path, HEADER)


def test_a_kill_before_the_earlier_file_goes_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, HEADER)
    for step in (1, 2):
        (tmp_path / f"state-{step}").write_bytes(bytes(step))
        journal.add("state", tmp_path / f"state-{step}", {"step": step})
    (tmp_path / "state-1").write_bytes(b"half of it")
    assert Journal(tmp_path, HEADER).done["state"]["notes"] == {"step": 2}
