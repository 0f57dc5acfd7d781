"""Records are appended whole, and a file that cannot take them is found before there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.errors import UsageError
from gossamer.measure.records import append_record, check_writable


def test_a_file_that_can_be_written_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    check_writable(path)
    append_record(path, {"a": 1})
    check_writable(path)
    append_record(path, {"b": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": 2}]


def test_a_folder_is_no_file_for_records(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)


def test_a_path_below_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match=r"file/r\.jsonl: records cannot be written there: Not a directory|File exists"
    ):
        check_writable(tmp_path / "file" / "r.jsonl")
