"""`gossamer eval` and `gossamer bench` from the command line to their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli import main
from gossamer.cli.eval import make_table, print_table
from tiny_llama import make_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GOSSAMER_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


EVAL = ["--context", "48", "--tokens", "200", "--samples", "1"]
BENCH = ["--prompt-tokens", "16", "--output-tokens", "4", "--repetitions", "2"]


def test_eval_prints_and_appends_one_record_for_each_model(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "eval.jsonl"
    code = main(["eval", tiny, "absent-model", "--reference", tiny, *EVAL, "--out", str(out), "--json", "--quiet"])
    printed = capsys.readouterr()
    records = lines(printed.out)
    assert code == 1
    assert [r["status"] for r in records] == ["ok", "failed"]
    assert records == lines(out.read_text())
    assert records[0]["protocol"]["context"] == 48
    assert records[0]["protocol"]["scored"] == 24
    assert records[0]["results"]["kld_mean"] == 0
    assert "absent-model" in printed.err
    assert "ModelNotFound" in printed.err
    assert main(["report", str(out), "--json"]) == 0
    assert "absent-model" in capsys.readouterr().out


def test_eval_prints_a_table_with_its_protocol(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.cli._console.SECONDS_BETWEEN_LINES", 0.0)
    assert main(["eval", tiny, *EVAL]) == 0
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "96 tokens scored in 4 windows of 48, the last 24 of each, stride 48" in printed.out
    assert "stored weights, " in printed.out
    assert " backend (" in printed.out
    assert "Why is the sky blue?" in printed.out
    assert "judging: 4/4" in printed.err


@pytest.mark.slow
def test_bench_gives_one_record_for_each_model_and_batch_size(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.jsonl"
    assert main(["bench", tiny, *BENCH, "--batch", "1,3", "--out", str(out), "--quiet"]) == 0
    records = lines(out.read_text())
    assert [r["protocol"]["batch"] for r in records] == [1, 3]
    assert all(len(r["results"]["decode_tokens_per_s"]["samples"]) == 2 for r in records)
    table = capsys.readouterr().out
    for results in (r["results"] for r in records):  # a model of no weight in a process of its own
        assert 0 <= results["rm_weights_bytes"] < 30e6 < results["bare_bytes"] < results["rm_peak_bytes"]
    assert "decode t/s" in table
    assert "prompt 16, output 4 tokens, median of 2 after 1 warm-up" in table
    assert main(["report", str(out), "--json"]) == 0
    assert Path(tiny).name in capsys.readouterr().out


@pytest.mark.usefixtures("inline")
def test_a_report_of_two_batch_sizes_has_both(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.jsonl"
    assert main(["bench", tiny, *BENCH, "--batch", "1,3", "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["report", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["protocol_mark"] for row in rows] == ["1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_model_that_fails_shows_its_traceback_to_who_debugs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([command, str(tmp_path)]) == 1
    quiet = capsys.readouterr()
    monkeypatch.setenv("GOSSAMER_DEBUG", "1")
    assert main([command, str(tmp_path)]) == 1
    assert "Traceback" not in quiet.err
    assert "Traceback" in capsys.readouterr().err
    assert "None" not in quiet.out


@pytest.mark.parametrize("command", [["eval", "m"], ["bench", "m"]])
def test_an_out_that_cannot_be_written_is_refused_before_any_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.measure.run.Worker", lambda *a: pytest.fail("worked"))
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: is a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*command, "--out", str(tmp_path / "file" / "x.jsonl")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("inline")
def test_the_table_is_shown_though_a_record_could_not_be_written(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, record: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gossamer.measure.records.append_record", full)
    assert main(["bench", tiny, *BENCH, "--out", str(tmp_path / "r.jsonl"), "--quiet"]) == 1
    printed = capsys.readouterr()
    assert "decode t/s" in printed.out
    assert "No space left on device" in printed.err


def test_a_table_says_where_the_weights_of_a_converted_model_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    note = "stored as Q4_1 (GGUF): already 4-bit"
    model = {"name": "a", "note": note, "bits_per_weight": 16.0, "format": "bf16"}
    print_table([{"model": model, "machine": {"threads": 1, "cpu": "c", "isa": "i"}}], make_table([], []), "p")
    said = capsys.readouterr().out
    assert "a: weights come from a Q4_1 GGUF file, so they are already 4-bit; held here as bf16" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "m", "--engine", "gosamer"], "did you mean 'gossamer'"),
        (["bench", "m", "--engine", "vlm"], "did you mean 'vllm'"),
        (["eval", "m", "--engine", "vllm"], "unknown engine 'vllm'"),
        (["bench", "m", "--weights", "floats"], "'floats'"),
        (["bench", "m", "--backend", "gpu"], "'gpu'"),
        (["eval", "m", "--activations", "int4"], "'int4'"),
        (["eval", "m", "--corpus", "wikitext"], "did you mean 'wikitext2'"),
        (["eval", "m", "--context", "16", "--scored", "16"], "cannot score 16 tokens of a window of 16"),
        (["bench", "m", "--batch", "1,x"], "'1,x' is not a list of numbers"),
        (["bench", "m", "--output-tokens", "1"], "output_tokens is 1"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
