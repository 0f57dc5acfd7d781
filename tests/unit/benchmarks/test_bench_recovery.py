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
    found = {"pruned-16": 40.0, "recover-local-16": 20.0, "lora-16": 36.0, "distill-16": 30.0}
    monkeypatch.setattr(Bench, "judge", lambda self, model: found.get(Path(model).name.removeprefix("wanda-sp-"), 10.0))
    monkeypatch.setitem(bench_recovery.STARTS, "wanda-sp", {"method": "wanda-sp", "ratio": 0.2, "multiple": 4})
    monkeypatch.setattr(bench_recovery, "PAGE", tmp_path / "recovery.md")
    words = ["--model", tiny_model, "--corpus", tmp_path / "text.txt", "--work", tmp_path / "work", "--write"]
    words += ["--starts", "wanda-sp", "--sequences", "20,16", "--length", 16, "--local", json.dumps({"tokens": 64})]
    monkeypatch.setattr(sys, "argv", ["bench_recovery.py", *map(str, words)])
    assert main() == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])
    rounds = ["recover-local", "lora", "distill"]
    assert [row["method"] for row in run["rows"]] == ["pruned", *rounds, *rounds]
    assert [row["sequences"] for row in run["rows"]] == [16, 16, 16, 16, 20, 20, 20]
    pruned, local, lora, distill, more, *_ = run["rows"]
    assert more["share"] == pytest.approx(1.0)
    assert local["share"] == pytest.approx(0.5)
    assert distill["share"] == pytest.approx(math.log(40 / 30) / math.log(4))
    assert local["share_per_minute"] == pytest.approx(60 * local["share"] / local["trained_seconds"])
    assert lora["trained_seconds"] == distill["trained_seconds"] >= 1
    assert pruned["tokens"] == 0
    assert local["tokens"] == 64
    assert lora["tokens"] > 0
    page = (tmp_path / "recovery.md").read_text()
    assert "| wanda-sp | recover-local | 16 | 20.00 | 50.0% | 64 |" in page
    assert "wanda-sp, 16 sequences: at least half came back" in page
    assert str(tmp_path) not in page


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--starts", "flap,half"], "no start 'half'"), (["--sequences", "32,4"], "4 sequences: at least the 16")],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_recovery.py", "--corpus", "x", *words])
    with pytest.raises(SystemExit):
        main()
    assert reason in capsys.readouterr().err
