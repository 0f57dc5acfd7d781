"""Calibration text: where it is read from, what is refused, and what is remembered."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.compress.calibration import cached_samples, calibrate
from gossamer.compress.recipe import CalibrationSpec
from gossamer.errors import CompressionError, UsageError
from tiny_llama import make_folder

TEXT = "\n".join(f"line {i} of a text that is long enough to be told from any other" for i in range(40))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    return open_checkpoint(make_folder(tmp_path / "model"))  # a context of 256


def spec(source: Path | str = "self", **changes: Any) -> CalibrationSpec:
    return CalibrationSpec.model_validate({"source": str(source), "sequences": 2, "length": 16, **changes})


def sampled(sequences: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 300, (sequences, length), generator=torch.Generator().manual_seed(seed))


def damaged(data: bytes) -> bytes:
    return data[:20] + bytes(b ^ 0xFF for b in data[20:60]) + data[60:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("short.txt.gz", gzip.compress(TEXT.encode())[:-20]),
        ("empty.txt.gz", gzip.compress(TEXT.encode())[:4]),
        ("damaged.txt.gz", damaged(gzip.compress(TEXT.encode()))),
        ("other.txt.gz", TEXT.encode()),
        ("latin.txt", "naïve".encode("latin-1")),
        ("field.jsonl", b'{"body": "x"}\n'),
        ("list.jsonl", b"[1]\n"),
        ("not.jsonl", b"text\n"),
        ("deep.jsonl", b"[" * 100_000 + b"\n"),
        ("half.jsonl", b'{"text": "\\ud800"}\n'),
        ("number.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n"),
    ],
)
def test_a_source_that_cannot_be_read_is_a_usage_error_naming_the_file(
    checkpoint: Checkpoint, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        calibrate(spec(tmp_path / name), checkpoint, None)


@pytest.mark.parametrize("error", [KeyError("text"), ValueError("No match for FieldRef.Name(text)"), OSError("thrift")])
def test_parquet_without_text_is_a_usage_error_naming_the_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def read_table(path: Path, columns: list[str]) -> None:
        raise error

    # What pyarrow raises for a column that is not there and for a damaged file derives from these.
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(read_table=read_table))
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"data\.parquet"):
        calibrate(spec(tmp_path / "data.parquet"), checkpoint, None)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines_may_hold_any_separator_that_json_allows(checkpoint: Checkpoint, tmp_path: Path, end: str) -> None:
    texts = [f"{TEXT}\u2028 and \u2029 and \x85", TEXT]
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    (tmp_path / "data.jsonl").write_bytes(end.join([*lines, ""]).encode())
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(end.join(lines).encode()))
    (tmp_path / "plain.txt").write_bytes("\n".join(texts).encode())
    jsonl, packed, plain = (
        calibrate(spec(tmp_path / name), checkpoint, None) for name in ("data.jsonl", "data.json.gz", "plain.txt")
    )
    assert jsonl.record["sha256"] == packed.record["sha256"] == plain.record["sha256"]


def test_sequences_longer_than_the_context_are_refused_alike_for_every_source(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert calibrate(spec(text, length=256), checkpoint, None).tokens.shape == (2, 256)
    for source in (text, "self"):
        with pytest.raises(CompressionError, match="257 tokens are longer than the 256 positions") as caught:
            calibrate(spec(source, length=257), checkpoint, sampled)
        assert "--calibration-length 256" in (caught.value.hint or "")


def test_the_record_names_the_file_and_no_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    record = calibrate(spec(tmp_path / "text.txt"), checkpoint, None).record
    assert record["details"]["source"] == "text.txt"
    assert str(tmp_path) not in json.dumps(record)


def test_whether_samples_are_cached_is_known_without_writing_anything(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert not cached_samples(spec(), checkpoint)
    assert not (tmp_path / "home" / "calibration").exists()
    first = calibrate(spec(), checkpoint, sampled)
    assert cached_samples(spec(), checkpoint)
    again = calibrate(spec(), checkpoint, None)  # no engine is asked
    assert torch.equal(first.tokens, again.tokens)
    assert first.record == again.record


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 17}, {"sequences": 3}, {"source": "text.txt"}])
def test_samples_of_another_kind_are_not_the_cached_ones(checkpoint: Checkpoint, change: dict[str, Any]) -> None:
    calibrate(spec(), checkpoint, sampled)
    assert not cached_samples(spec(**{"source": "self", **change}), checkpoint)


def test_samples_of_another_model_or_cut_short_are_not_the_cached_ones(checkpoint: Checkpoint, tmp_path: Path) -> None:
    calibrate(spec(), checkpoint, sampled)
    assert not cached_samples(spec(), open_checkpoint(make_folder(tmp_path / "other", seed=1)))
    (path,) = (tmp_path / "home" / "calibration").iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    assert not cached_samples(spec(), checkpoint)
