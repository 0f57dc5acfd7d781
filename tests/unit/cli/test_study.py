"""`gossamer study precision` from the command line to its files, on a model of no size."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli import main
from gossamer.cli.study import bytes_of
from gossamer.errors import UsageError
from tiny_llama import make_folder

SMALL = ["--context", "48", "--tokens", "200", "--prompt-tokens", "16", "--output-tokens", "4", "--repetitions", "1"]
SMALL += ["--batch", "1,2", "--calibration-sequences", "4", "--calibration-length", "32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("models") / "tiny", torch_dtype="bfloat16"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GOSSAMER_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def kinds(path: Path) -> list[tuple[str, str]]:
    records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["kind"], r["status"]) for r in records]


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_a_study_ends_in_table_plot_records_and_a_recommendation_and_goes_on_where_it_stopped(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    command = ["study", "precision", tiny, "--out", str(out), *SMALL, "--quiet"]
    assert main([*command, "--formats", "int8,int4", "--max-kld", "100"]) == 0
    printed = capsys.readouterr()
    assert "Take int4: " in printed.out
    assert "2 of 2 formats keep to a KL divergence of at most 100" in printed.out
    assert "decode t/s, batch 2" in printed.out
    assert kinds(out / "study.jsonl") == [("compress", "ok")] * 2 + [("eval", "ok")] * 3 + [("bench", "ok")] * 6
    assert "Take int4" in (out / "study.md").read_text()
    ET.fromstring((out / "study.svg").read_text())

    before = (out / "study.jsonl").read_bytes()
    assert main([*command, "--formats", "int8,int4", "--json"]) == 0
    assert (out / "study.jsonl").read_bytes() == before
    answer = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in answer["rows"][1:]] == ["int4", "int8"]
    assert answer["rows"][0]["baseline"]
    assert answer["rows"][0]["kld"] == 0
    assert answer["rows"][1]["kld"] > answer["rows"][2]["kld"] > 0
    assert main(["report", str(out), "--json"]) == 0  # the records are those of every other command
    assert "int4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_a_format_that_cannot_be_made_is_a_failed_row_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = str(make_folder(tmp_path / "odd", intermediate_size=40))  # groups of 32 do not divide it
    out = tmp_path / "study"
    code = main(["study", "precision", odd, "--out", str(out), *SMALL, "--formats", "int8,int2", "--method", "rtn"])
    printed = capsys.readouterr()
    assert code == 1
    assert "failed" in printed.out
    assert "int2: making it failed: ShapeMismatch" in printed.out
    assert ("compress", "failed") in kinds(out / "study.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "precision", "TINY", "--out", "o", "--formats", "int44"], "did you mean 'int4'"),
        (["study", "precision", "TINY", "--out", "o", "--method", "gptqq"], "did you mean 'gptq'"),
        (["study", "precision", "TINY", "--out", "o", "--batch", "1,x"], "'1,x' is not a list of numbers"),
        (["study", "precision", "TINY", "--out", "o", "--batch", "0"], "batch is 0"),
        (["study", "precision", "TINY", "--out", "o", "--max-size", "100 parsecs"], "'100 parsecs' is not a size"),
        (["study", "precision", "TINY"], "--out"),
        (["study", "TINY"], "or 'study precision'"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    arguments: list[str],
    message: str,
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([tiny if a == "TINY" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("o/models/*"))


@pytest.mark.parametrize(
    ("text", "count"),
    [("100MB", 100_000_000), ("0.5 gb", 500_000_000), ("64MiB", 64 << 20), ("1234", 1234), ("1e3", None)],
)
def test_sizes(text: str, count: int | None) -> None:
    if count is None:
        with pytest.raises(UsageError):
            bytes_of(text)
    else:
        assert bytes_of(text) == count


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_a_study_of_pairs_ends_in_a_matrix_with_reasons_for_its_gaps(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs"
    command = ["study", "combine", tiny, "--out", str(out), *SMALL[:4], *SMALL[-4:], "--quiet"]
    assert main([*command, "--stages", "rotate,int3"]) == 0
    printed = capsys.readouterr().out
    assert "than int3 alone" in printed
    assert "changes float weights, but stage 1 (gptq) has quantized them" in printed
    assert kinds(out / "study.jsonl") == [("compress", "ok")] * 2 + [("eval", "ok")] * 3
    assert "| rotate | int3 |" in (out / "combine.md").read_text()
    assert main([*command, "--stages", "rotate,int3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(pair["first"], pair["second"]) for pair in answer["pairs"]] == [("rotate", "int3")]
    assert main([*command, "--stages", "rotat"]) == 2
    assert "rotate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_of_ranks_ends_in_uniform_beside_allocated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_folder(tmp_path / "wide", torch_dtype="bfloat16", hidden_size=128, intermediate_size=256, head_dim=32)
    out = tmp_path / "ranks"
    command = ["study", "rank", str(model), "--out", str(out), *SMALL[:4], *SMALL[-4:], "--quiet", "--ratios", "0.8"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Ratio 0.8: KL divergence" in printed
    assert kinds(out / "study.jsonl") == [("compress", "ok")] * 2 + [("eval", "ok")] * 3
    page = (out / "rank.md").read_text()
    assert "| 0.8 | uniform |" in page
    assert "| 0.8 | allocated |" in page
    ET.fromstring((out / "study.svg").read_text())
    before = (out / "study.jsonl").read_bytes()
    assert main([*command, "--json"]) == 0
    assert (out / "study.jsonl").read_bytes() == before
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert set(rows) == {str(model), "0.8", "0.8-kld"}
    assert rows["0.8-kld"]["parameters"] < rows[str(model)]["parameters"]
    assert rows["0.8-kld"]["parameters"] * 2 == rows["0.8-kld"]["nbytes"]
    assert main([*command[:-2], "--ratios", "2"]) == 2
    assert "not a share" in capsys.readouterr().err
