"""The benchmark of recovery: shares and rates of what it measures, and the page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import bench_recovery
from bench_recovery import Bench, main


def test_one_run_makes_every_row_and_the_page(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"wanda-sp-pruned": 40.0, "wanda-sp-recover-local": 20.0, "wanda-sp-lora": 36.0, "wanda-sp-distill": 30.0}
    monkeypatch.setattr(Bench, "judge", lambda self, model: found.get(Path(model).name, 10.0))
    monkeypatch.setitem(bench_recovery.STARTS, "wanda-sp", {"method": "wanda-sp", "ratio": 0.2, "multiple": 4})
    monkeypatch.setattr(bench_recovery, "PAGE", tmp_path / "recovery.md")
    words = ["--model", tiny_model, "--corpus", tmp_path / "text.txt", "--work", tmp_path / "work", "--write"]
    words += ["--starts", "wanda-sp", "--sequences", 8, "--length", 16, "--local", json.dumps({"tokens": 64})]
    monkeypatch.setattr(sys, "argv", ["bench_recovery.py", *map(str, words)])
    assert main() == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["method"] for row in run["rows"]] == ["pruned", "recover-local", "lora", "distill"]
    pruned, local, lora, distill = run["rows"]
    assert local["share"] == pytest.approx(0.5)
    assert distill["share"] == pytest.approx(math.log(40 / 30) / math.log(4))
    assert local["share_per_minute"] == pytest.approx(60 * local["share"] / local["seconds"])
    assert lora["trained_seconds"] == distill["trained_seconds"] >= 1
    assert pruned["tokens"] == 0
    assert local["tokens"] == 64
    assert lora["tokens"] > 0
    page = (tmp_path / "recovery.md").read_text()
    assert "| wanda-sp | recover-local | 20.00 | 50.0% | 64 |" in page
    assert "wanda-sp: at least half came back" in page
    assert str(tmp_path) not in page


def test_an_unknown_start_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_recovery.py", "--corpus", "x", "--starts", "flap,half"])
    with pytest.raises(SystemExit):
        main()
    assert "no start 'half'" in capsys.readouterr().err
