"""The page: self-contained, escaped, the same bytes for the same rows, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.errors import MeasureError, UsageError
from gossamer.report import export, load, render_html, write_html


class _Elements(HTMLParser):
    """Every element with its attributes, and the text of every script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script" and dict(attrs).get("type") is None:
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text.append(data)


@pytest.fixture
def rows_of(tmp_path: Path, made: ModuleType) -> Any:
    """Rows of these records, through a file."""
    return lambda *records: load([made.write(tmp_path / "r.jsonl", *records)])


@pytest.fixture
def hostile(rows_of: Any, made: ModuleType) -> Any:
    """Rows whose every foreign string tries to become markup."""
    bad = made.HOSTILE
    base, other = made.model("base" + bad, note=bad), made.model(bad, 50, recipe=bad, base="base" + bad)
    compared = {"reference": "base" + bad, "reference_fingerprint": None, bad: bad}
    layers = made.compression(other, blocks=1)
    layers["results"]["layers"][0].update(linear=bad, format=bad)
    return rows_of(
        made.evaluation(base, samples=[{"prompt": bad, "output": bad}]),
        made.evaluation(other, 13, 0.1, 0.9, [{"prompt": bad, "output": "x" + bad}], compared),
        made.bench(base, engine={"name": bad, "backend": bad}, machine={"cpu": bad}),
        made.failed(made.bench(made.model("c" + bad)), bad),
        layers,
    )


def test_hostile_text_makes_no_element_attribute_or_script(hostile: Any, made: ModuleType) -> None:
    page = _Elements(render_html(hostile, made.HOSTILE))
    assert "img" not in {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert made.HOSTILE in "".join(page.text), "it is shown as text"
    assert not [script for script in page.scripts if "document.title=" in script]


def test_the_embedded_data_cannot_end_its_element(hostile: Any, made: ModuleType) -> None:
    page = render_html(hostile)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in data
    assert made.HOSTILE[:20] in json.loads(data)["panels"][0]["missing"][0] + json.dumps(json.loads(data))


def test_the_page_names_no_address_outside_itself(rows_of: Any, made: ModuleType) -> None:
    page = _Elements(render_html(rows_of(*made.study())))
    loads = [value for _, attributes in page.elements for name, value in attributes.items()
             if name in ("src", "href", "srcset", "action", "poster", "data")]  # fmt: skip
    assert loads == ["data:,"], "only the empty icon"
    style = Path(export.__file__).with_name("assets").joinpath("style.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_scripts_of_the_page_and_no_other(rows_of: Any, made: ModuleType) -> None:
    page = _Elements(render_html(rows_of(*made.study())))
    (policy,) = [html.unescape(a["content"] or "") for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    (allowed,) = re.findall(r"script-src ([^;]*);", policy)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert allowed.split() == [f"'sha256-{digest}'" for digest in digests]
    assert len(digests) == 3


def test_a_page_with_nothing_to_draw_carries_no_plotting_library(rows_of: Any, made: ModuleType) -> None:
    one = render_html(rows_of(made.evaluation(made.model("a")), made.bench(made.model("a"))))
    assert len(one) < 60_000
    for absent in ("Trade-offs", "Sensitivity", "Samples", "KLD mean"):
        assert absent not in _headings(one)
    assert "Results" in _headings(one)


def _headings(page: str) -> str:
    return " ".join(re.findall(r"<h2[^>]*>(.*?)</h2>", page))


def test_sections_appear_with_what_they_show(rows_of: Any, made: ModuleType) -> None:
    page = render_html(rows_of(*made.study()))
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == [
        "Results", "Trade-offs", "Sensitivity of the layers", "Samples", "Protocol and machine"
    ]  # fmt: skip
    assert page.count("<mark>") == 1 + 4 + 2, "one explains; four models depart in one prompt, two in the other"


def test_failed_rows_and_differing_protocols_are_in_the_page(rows_of: Any, made: ModuleType) -> None:
    records = made.study()
    records[2]["protocol"]["context"] = 256
    page = render_html(rows_of(*records))
    assert "int2-kmeans: eval: NaN in block 3 down" in page
    assert "Quality was not measured under one protocol." in page
    assert re.search(r"<bdi>int8</bdi> <sup[^>]*>b</sup>", page)


def test_the_same_rows_give_the_same_bytes(rows_of: Any, made: ModuleType) -> None:
    assert render_html(rows_of(*made.study())) == render_html(rows_of(*made.study()))


def test_numbers_that_are_not_finite_do_not_break_the_page(rows_of: Any, made: ModuleType) -> None:
    page = render_html(rows_of(made.evaluation(made.model("a"), float("inf")), made.evaluation(made.model("b", 50))))
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL) or ["{}"]
    json.loads(data, parse_constant=pytest.fail)
    assert re.search(r'data-value="" class="edge ">inf<', page)


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="no rows"):
        write_html([], tmp_path / "r.html", "x")


def test_a_failed_write_leaves_the_old_page_and_no_rubbish(
    tmp_path: Path, rows_of: Any, made: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, folder = rows_of(made.bench(made.model("a"))), tmp_path / "out"
    folder.mkdir()
    target = folder / "report.html"
    target.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MeasureError, match=r"report\.html: cannot be written: No space left"):
        write_html(rows, target, "x")
    assert target.read_text() == "old"
    assert os.listdir(folder) == ["report.html"]
    monkeypatch.undo()
    write_html(rows, target, "x")
    assert target.read_text().startswith("<!doctype html>")
    assert os.listdir(folder) == ["report.html"]


def test_a_folder_is_no_place_for_a_page(tmp_path: Path, rows_of: Any, made: ModuleType) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        write_html(rows_of(made.bench(made.model("a"))), tmp_path, "x")
