"""Corpora are read exactly, and none judges a model that it calibrated."""

from __future__ import annotations

import hashlib
import platform
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.textprint import line_hashes, text_sha256
from gossamer.errors import Contaminated, MeasureError, UnknownName
from gossamer.measure.corpus import Corpus, check_contamination, load_corpus


def long_line(n: int) -> str:
    return f"{n}: a line that is long enough to say where it comes from"


def text_of(lines: range) -> str:
    return "\n".join(long_line(n) for n in lines)


def test_the_default_corpus_is_large_stable_and_named_after_its_python() -> None:
    first, second = load_corpus("default"), load_corpus("default")
    assert first.sha256 == second.sha256 == hashlib.sha256(first.text.encode()).hexdigest()
    assert first.name == f"pydoc-topics-{platform.python_version()}"
    assert len(first.text) > 300_000


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes("naïve\r\nlines\n".encode())
    assert load_corpus(path) == Corpus("prose.txt", "naïve\r\nlines\n")


@pytest.mark.parametrize(("content", "message"), [(b"ab\xff", "byte 2 is 0xff"), (b" \n", "empty")])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(MeasureError, match=message):
        load_corpus(str(path))


def test_an_unknown_corpus_suggests_a_known_one() -> None:
    with pytest.raises(UnknownName, match="did you mean 'wikitext2'"):
        load_corpus("wikitext")


def test_wikitext_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MeasureError, match="--corpus FILE"):
        load_corpus("wikitext2")


def test_wikitext_is_the_raw_test_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    archive = tmp_path / "wikitext.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("wikitext-2-raw/wiki.test.raw", " \n = Title = \n")
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = lambda *names, **options: str(archive)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_corpus("wikitext2") == Corpus("wikitext2-test", " \n = Title = \n")
    archive.write_bytes(b"<html>")
    with pytest.raises(MeasureError, match="no zip file"):
        load_corpus("wikitext2")


def test_line_hashes_are_of_distinct_stripped_long_lines() -> None:
    long = long_line(1)
    assert line_hashes(f"  {long}\t\nshort\n{long}\n") == [hashlib.sha256(long.encode()).hexdigest()[:16]]
    assert line_hashes("x" * 39) == []
    assert len(line_hashes("x" * 40)) == 1


def manifest(**calibration: Any) -> dict[str, Any]:
    return {"calibration": {"kind": "text", **calibration}}


@pytest.mark.parametrize("found", [None, {}, {"calibration": None}, manifest(sha256="other", line_hashes=[])])
def test_a_model_with_another_calibration_or_none_is_judged(found: dict[str, Any] | None) -> None:
    check_contamination(Corpus("c", text_of(range(10))), found, "m")


def test_the_calibration_text_itself_is_refused() -> None:
    corpus = Corpus("c", "short\nlines\nonly\n")
    for record in (manifest(sha256=corpus.sha256), manifest(details={"text_sha256": text_sha256(corpus.text)})):
        with pytest.raises(Contaminated, match=r"small was calibrated on 100\.0% of corpus c"):
            check_contamination(corpus, record, "small")


def test_more_than_one_percent_of_known_lines_is_refused_and_less_is_not() -> None:
    corpus = Corpus("c", text_of(range(1000)))
    check_contamination(corpus, manifest(line_hashes=line_hashes(text_of(range(990, 2000)))), "m")
    with pytest.raises(Contaminated, match=r"1\.1%"):
        check_contamination(corpus, manifest(line_hashes=line_hashes(text_of(range(989, 2000)))), "m")


def test_known_lines_are_counted_in_the_judged_part_too() -> None:
    corpus, found = Corpus("c", text_of(range(1000))), manifest(line_hashes=line_hashes(text_of(range(5))))
    check_contamination(corpus, found, "m")
    check_contamination(corpus, found, "m", judged=text_of(range(1000)))
    with pytest.raises(Contaminated, match=r"m was calibrated on 50\.0% of the judged part of corpus c"):
        check_contamination(corpus, found, "m", judged=text_of(range(10)))


def test_what_calibrated_an_ancestor_counts_and_shares_add_up() -> None:
    corpus = Corpus("c", text_of(range(1000)))
    parts = [{"sha256": "x", "line_hashes": line_hashes(text_of(range(n, n + 6)))} for n in (0, 6)]
    check_contamination(corpus, {"calibration": parts[0], "base": {"calibrations": []}}, "m")
    with pytest.raises(Contaminated, match=r"1\.2%"):
        check_contamination(corpus, {"calibration": parts[0], "base": {"calibrations": parts[1:]}}, "m")
    with pytest.raises(Contaminated, match=r"100\.0%"):
        check_contamination(corpus, {"calibration": None, "base": {"calibrations": [{"sha256": corpus.sha256}]}}, "m")
