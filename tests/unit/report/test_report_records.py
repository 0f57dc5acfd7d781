"""Reading result records: what is tolerated, and what is refused with file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.errors import MeasureError, UsageError
from gossamer.report import load, records
from gossamer.report.records import read_records


def _bad(made: ModuleType, **changes: Any) -> bytes:
    return json.dumps({**made.evaluation(made.model("a")), **changes}).encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"schema": 1, "kind": "ev', "not a JSON record"),
        (b"not json", "not a JSON record"),
        (b"\xff\xfe{}", "not a JSON record"),
        (b"[" * 100_000, "not a JSON record"),
        (b'{"a": "\\ud800"}', "not a JSON record"),
        (b"[1, 2]", "a list"),
        (b"{}", "no schema version"),
        (b'{"schema": 2}', "schema version 2"),
        (b'{"schema": "1"}', "schema version '1'"),
        (b'{"schema": true}', "schema version True"),
        (b'{"schema": 1, "kind": "serve"}', "kind"),
        (b'{"schema": 1}', "kind"),
    ],
)
def test_a_line_that_is_no_record_is_refused_by_file_and_line(
    tmp_path: Path, made: ModuleType, line: bytes, says: str
) -> None:
    path = made.write(tmp_path / "runs.jsonl", made.evaluation(made.model("a")))
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(MeasureError) as caught:
        load([path])
    assert f"{path}:3: " in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"status": "fine"}, "status"),
        ({"created": "yesterday"}, "created"),
        ({"created": 3}, "created"),
        ({"model": {"name": ""}}, "model.name"),
        ({"model": {"name": "a", "weight_bytes": -1}}, "model.weight_bytes"),
        ({"model": {"name": "a", "weight_bytes": "12"}}, "model.weight_bytes"),
        ({"results": {"top1_agreement": 91.3}}, "results.top1_agreement"),
        ({"results": {"samples": [{"prompt": "x"}]}}, "results.samples.0.output"),
        ({"protocol": []}, "protocol"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(
    tmp_path: Path, made: ModuleType, changes: dict[str, Any], field: str
) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(_bad(made, **changes))
    with pytest.raises(MeasureError) as caught:
        load([path])
    assert f"{path}:1: {field}: " in str(caught.value)


def test_a_line_longer_than_any_record_is_refused_without_reading_it_whole(
    tmp_path: Path, made: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made.write(tmp_path / "runs.jsonl", made.evaluation(made.model("a")))
    load([path])
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    with pytest.raises(MeasureError, match=r"runs\.jsonl:1: longer than 100 bytes"):
        load([path])


def test_unknown_extra_keys_are_tolerated_everywhere(tmp_path: Path, made: ModuleType) -> None:
    record = made.bench(made.model("a", future=1))
    record["new"] = {"x": 1}
    record["results"]["energy_j"] = 3.5
    record["results"]["ttft_s"]["p99"] = 2
    assert load([made.write(tmp_path / "r.jsonl", record)])[0].decode_tokens_per_s == 30.0


def test_numbers_that_are_not_finite_are_read_as_such(tmp_path: Path, made: ModuleType) -> None:
    path = made.write(tmp_path / "r.jsonl", made.evaluation(made.model("a")))
    path.write_text(path.read_text().replace('"perplexity": 12.0', '"perplexity": NaN'))
    perplexity = load([path])[0].perplexity
    assert perplexity is not None
    assert math.isnan(perplexity)


def test_folders_are_searched_and_a_file_named_twice_counts_once(tmp_path: Path, made: ModuleType) -> None:
    inner = made.write(tmp_path / "deep" / "er" / "a.jsonl", made.evaluation(made.model("a")))
    made.write(tmp_path / "b.jsonl", made.evaluation(made.model("b")))
    (tmp_path / "notes.txt").write_text("not a record")
    assert [r.model.name for r in read_records([tmp_path, inner])] == ["b", "a"]


def test_hidden_files_and_folders_are_the_work_of_others(tmp_path: Path, made: ModuleType) -> None:
    runs = tmp_path / ".cache" / "runs"  # only what is below the folder that was named counts
    made.write(runs / "a.jsonl", made.evaluation(made.model("a")))
    for hidden in (runs / ".small.work" / "journal.jsonl", runs / ".b.jsonl"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_text("not a record\n")
    assert [r.model.name for r in read_records([runs])] == ["a"]


def test_a_path_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.jsonl: no such file"):
        load([tmp_path / "nowhere.jsonl"])


def test_a_folder_without_records_is_an_error_and_not_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(MeasureError, match="no result records"):
        load([tmp_path])
