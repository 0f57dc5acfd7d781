"""The report in a real browser: plots are drawn, headers sort, nothing is requested, nothing hostile runs.

A script appended to a copy of the page acts as the reader and writes what it saw into the document; its own policy is
widened by that script's hash alone, so that everything else runs under the page's policy.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.report import load, render_html

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, no google-chrome (apt-get install chromium)"),
]

WATCH = """
window.seen = { violations: [], errors: [] };
document.addEventListener("securitypolicyviolation", (e) => seen.violations.push(e.violatedDirective));
addEventListener("error", (e) => seen.errors.push(String(e.message)));
"""
REPORT = """
seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
document.documentElement.dataset.seen = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The made records of the unit tests."""
    path = Path(__file__).parents[1] / "unit" / "report" / "report_records.py"
    spec = importlib.util.spec_from_file_location("report_records", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _browse(page: Path, *flags: str) -> str:
    """Open a page in a browser of its own and return what it printed."""
    assert CHROMIUM is not None
    # What the browser leaves goes with the test. Its sockets' paths may have a hundred letters: tmp_path is too long.
    with tempfile.TemporaryDirectory() as short:
        return _run(page, Path(short), *flags)


def _run(page: Path, scratch: Path, *flags: str) -> str:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--virtual-time-budget=5000", f"--user-data-dir={scratch / 'profile'}", *flags, page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    return done.stdout


def _act(text: str, script: str, tmp_path: Path, *flags: str, policy: bool = True) -> dict[str, Any]:
    """What the script saw in a copy of the page; without its policy, escaping alone has to hold."""
    script += REPORT
    hashes = "".join(
        f" 'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in (WATCH, script)
    )
    if policy:
        text = text.replace("script-src ", html.escape(f"script-src{hashes} "), 1)
    else:
        text, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        assert removed == 1
    text = text.replace("<title>", f"<script>{WATCH}</script><title>", 1)
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    found = re.search(r'<html[^>]* data-seen="([^"]*)"', _browse(copy, "--dump-dom", *flags))
    assert found, "the script did not reach its end"
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


def _page(tmp_path: Path, made: ModuleType, records: list[Any]) -> str:
    return render_html(load([made.write(tmp_path / "runs.jsonl", *records)]), "Browser test")


def test_plots_are_drawn_and_change_and_nothing_is_requested(tmp_path: Path, made: ModuleType) -> None:
    script = """
    const count = (where, what) => document.querySelectorAll(`${where} ${what}`).length;
    const state = () => ({
      points: ["size", "speed"].map((axis) => count(`figure[data-axis=${axis}]`, "svg .scatterlayer .points path")),
      lines: ["size", "speed"].map((axis) => count(`figure[data-axis=${axis}]`, "svg .scatterlayer path.js-line")),
      labels: count("figure", "svg .annotation-text"),
      heat: count("#heat", "svg .heatmaplayer image"),
      caption: document.getElementById("heat-caption").textContent,
    });
    seen.before = state();
    document.querySelector("#metric input[value=perplexity]").click();
    const select = document.getElementById("heat-model");
    select.value = "2";
    select.dispatchEvent(new Event("change"));
    seen.after = state();
    """
    seen = _act(_page(tmp_path, made, made.study()), script, tmp_path, "--window-size=1300,1000")
    assert seen["before"]["points"] == [5, 5], "five models have a divergence; the failed one is absent"
    assert seen["before"]["lines"] == [1, 1]
    assert seen["before"]["heat"] == 1
    assert seen["after"]["points"] == [6, 6], "in perplexity the baseline is a point too"
    assert seen["before"]["labels"] >= 8
    assert seen["before"]["caption"].startswith("Relative output error")
    assert seen["after"]["caption"].startswith("Relative weight error")
    assert (seen["requests"], seen["violations"], seen["errors"]) == ([], [], [])


def test_a_header_sorts_best_first_then_worst_then_as_it_was(tmp_path: Path, made: ModuleType) -> None:
    script = """
    const names = () => [...document.querySelectorAll("#rows tbody th bdi")].map((n) => n.textContent);
    const headers = [...document.querySelectorAll("#rows tr.columns th")];
    const header = (text) => headers.find((h) => h.textContent.includes(text));
    const press = (text) => {
      const button = header(text).querySelector("button");
      button.focus();
      if (document.activeElement !== button) throw new Error("a header cannot be focused");
      button.click();
      const sorted = headers.filter((h) => h.getAttribute("aria-sort") !== "none");
      return [header(text).getAttribute("aria-sort"), sorted.length, names()];
    };
    seen.decode = [press("Decode"), press("Decode"), press("Decode")];
    seen.perplexity = press("Perplexity");
    seen.model = press("Model");
    """
    seen = _act(_page(tmp_path, made, made.study()), script, tmp_path)
    original = ["smollm2", "int2-kmeans", "int3-gptq", "int4-gptq", "int4-rtn", "prune-20", "int8"]
    fastest = ["int4-rtn", "int4-gptq", "int3-gptq", "int2-kmeans", "int8", "prune-20", "smollm2"]
    assert seen["decode"] == [["descending", 1, fastest], ["ascending", 1, fastest[::-1]], ["none", 0, original]]
    best = ["smollm2", "int8", "int4-gptq", "int4-rtn", "int3-gptq", "prune-20", "int2-kmeans"]
    assert seen["perplexity"] == ["ascending", 1, best], "the failed one has no perplexity and stays last"
    assert seen["model"] == ["ascending", 1, sorted(original)]
    assert seen["errors"] == []


@pytest.mark.parametrize("policy", [True, False], ids=["with-policy", "escaping-alone"])
def test_hostile_text_is_shown_and_does_not_run(tmp_path: Path, made: ModuleType, policy: bool) -> None:
    bad = (
        "</script><img src=x onerror=\"window.owned=1\"><a href='https://example.invalid/'>a</a>"
        "<script>window.owned=1</script>"
    )
    base, other = made.model(bad + "0", note=bad), made.model(bad, 50, recipe=bad, base=bad + "0")
    compared = {"reference": bad + "0", "reference_fingerprint": None}
    layers = made.compression(other, blocks=2)
    for layer in layers["results"]["layers"]:
        layer.update(linear=layer["linear"] + bad, format=bad)
    records = [
        made.evaluation(base, 12, samples=[{"prompt": bad, "output": bad}]),
        made.evaluation(other, 13, 0.1, 0.9, [{"prompt": bad, "output": "x" + bad}], compared),
        made.evaluation(made.model("third", 70, recipe="third"), 12.5, 0.05, 0.95, protocol=compared),
        made.bench(base), made.bench(other), layers,
        made.failed(made.bench(made.model("failed" + bad)), bad),
    ]  # fmt: skip
    script = """
    document.querySelector("#metric input[value=perplexity]").click();
    const point = document.querySelector("figure svg .points path");
    point.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
    seen.owned = window.owned === undefined ? null : window.owned;
    seen.images = document.images.length;
    seen.links = document.querySelectorAll("a").length;
    seen.drawn = document.querySelectorAll("figure svg .points path").length;
    seen.shown = document.querySelector("h1").textContent;
    """
    seen = _act(_page(tmp_path, made, records), script, tmp_path, "--window-size=1300,1000", policy=policy)
    assert (seen["owned"], seen["images"], seen["links"]) == (None, 0, 0)
    assert seen["drawn"] > 0
    assert seen["shown"].startswith(bad)
    assert (seen["requests"], seen["violations"], seen["errors"]) == ([], [], [])


@pytest.mark.parametrize("width", [1300, 500])
def test_the_page_never_scrolls_sideways_as_a_whole(tmp_path: Path, made: ModuleType, width: int) -> None:
    script = """
    seen.widths = [document.documentElement.scrollWidth, innerWidth];
    seen.plots = [...document.querySelectorAll(".plot")].map((p) => p.scrollWidth <= p.clientWidth + 1);
    """
    page = _page(tmp_path, made, made.study())
    seen = _act(page, script, tmp_path, f"--window-size={width},900")
    assert seen["widths"] == [width, width]
    assert seen["plots"] == [True, True, True]


def test_a_screenshot_can_be_taken(tmp_path: Path, made: ModuleType) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(_page(tmp_path, made, made.study()), encoding="utf-8")
    _browse(page, "--window-size=1300,1600", f"--screenshot={picture}")
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1300, 1600)
    assert len(data) > 50_000, "an empty page would be far smaller"
