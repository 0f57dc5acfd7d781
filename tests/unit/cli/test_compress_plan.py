"""`gossamer compress`, `plan` and `convert`: manners, exit codes, and what they leave on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gossamer.cli import main
from tiny_llama import make_folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    return make_folder(tmp_path / "model", hidden_size=64, intermediate_size=128)


def write_recipe(path: Path, text: str = "bits: 4, group_size: 32") -> Path:
    path.write_text(f"version: 1\nname: mine\nstages: [{{method: gptq, {text}}}]\n")
    return path


def gptq(model: Path, out: Path, *more: str) -> list[str]:
    recipe = write_recipe(out.parent / "mine.yaml")
    sizes = ["--calibration-sequences", "4", "--calibration-length", "32"]
    return ["compress", str(model), "--recipe", str(recipe), "--out", str(out), *sizes, *more]


def test_compress_prints_its_record_as_one_json_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "runs" / "results.jsonl"
    assert main(gptq(model, tmp_path / "out", "--json", "--quiet", "--record", str(record))) == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out)
    assert row["kind"] == "compress"
    assert row["model"]["recipe"] == "mine"
    assert row["protocol"]["calibration"]["kind"] == "self"
    assert len(row["results"]["layers"]) == 2 * 7
    assert json.loads(record.read_text()) == row
    assert printed.err == ""


def test_calibration_by_own_samples_is_repeatable_and_cached(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(gptq(model, tmp_path / name, "--quiet")) == 0
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b")]
    assert files[0] == files[1]
    assert len(list((tmp_path / "home" / "calibration").iterdir())) == 1


def test_an_artifact_replays_bit_for_bit_without_its_calibration_cache(model: Path, tmp_path: Path) -> None:
    assert main(gptq(model, tmp_path / "a", "--quiet")) == 0
    for cached in (tmp_path / "home" / "calibration").iterdir():
        cached.unlink()
    again = ["compress", str(model), "--recipe", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "-q"]
    assert main(again) == 0
    for file in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_calibration_text_is_recorded_by_its_lines(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of a text that is long enough to be told from others" for i in range(60)))
    assert main(gptq(model, tmp_path / "out", "--calibration", str(text), "-q")) == 0
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert manifest["calibration"]["kind"] == "text"
    assert len(manifest["calibration"]["line_hashes"]) == 60
    assert str(tmp_path) not in json.dumps(manifest)  # no folder of the machine that it was made on
    moved = tmp_path / "elsewhere" / "text.txt"
    moved.parent.mkdir()
    text.rename(moved)
    assert main(gptq(model, tmp_path / "out", "--calibration", str(moved), "-q")) == 0  # the same text: there already


def test_a_replay_on_another_model_never_takes_the_first_ones_tokens(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_folder(tmp_path / "other", seed=1, hidden_size=64, intermediate_size=128)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of a text that is long enough to be told from others" for i in range(60)))
    assert main(gptq(model, tmp_path / "a", "-q")) == 0
    assert main(gptq(model, tmp_path / "t", "--calibration", str(text), "-q")) == 0
    for recipe, code in (("a", 0), ("t", 1 + 1)):
        command = ["compress", str(other), "--recipe", str(tmp_path / recipe), "--out", str(tmp_path / "b" / recipe)]
        assert main([*command, "-q"]) == code
    assert "for another model" in capsys.readouterr().err
    hashes = [
        json.loads((p / "gossamer.json").read_text())["calibration"]["sha256"]
        for p in (tmp_path / "a", tmp_path / "b" / "a")
    ]
    assert hashes[0] != hashes[1]


def test_calibration_options_are_refused_by_a_recipe_that_uses_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "rtn.yaml"
    recipe.write_text("version: 1\nname: mine\nstages: [{method: rtn, group_size: 32}]\n")
    command = ["compress", str(model), "--recipe", str(recipe), "--out", str(tmp_path / "out"), "-q"]
    for words in (["--calibration", "/no/such/file"], ["--seed", "1"], ["--calibration-length", "16"]):
        assert main([*command, *words]) == 2
        assert words[0] in capsys.readouterr().err


def test_a_failed_compression_leaves_a_failed_record_and_a_found_one_its_layers(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_folder(tmp_path / "broken", hidden_size=64, intermediate_size=128)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    record, recipe = tmp_path / "r.jsonl", tmp_path / "rtn.yaml"
    recipe.write_text("version: 1\nname: mine\nstages: [{method: rtn, group_size: 32}]\n")
    more = ["--recipe", str(recipe), "--record", str(record), "-q"]
    assert main(["compress", str(broken), "--out", str(tmp_path / "bad"), *more]) == 1
    (row,) = map(json.loads, record.read_text().splitlines())
    assert row["status"] == "failed"
    assert row["model"]["recipe"] == "mine"
    assert "up_proj" in row["error"]
    record.unlink()
    for expected in (1, 1, 1):  # made, then there already: recorded once; then the record is lost
        assert main(["compress", str(model), "--out", str(tmp_path / "out"), *more]) == 0
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        assert len(rows) == expected
    record.unlink()
    assert main(["compress", str(model), "--out", str(tmp_path / "out"), *more]) == 0
    (row,) = map(json.loads, record.read_text().splitlines())
    assert len(row["results"]["layers"]) == 2 * 7
    assert row["results"]["seconds"] is None


def test_a_replay_with_other_versions_is_said_unless_quiet(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(gptq(model, tmp_path / "a", "-q")) == 0
    manifest = json.loads((tmp_path / "a" / "gossamer.json").read_text())
    manifest["versions"]["threads"] = "99"
    (tmp_path / "a" / "gossamer.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    for out, more in (("quiet", ["-q"]), ("loud", [])):
        command = ["compress", str(model), "--recipe", str(tmp_path / "a"), "--out", str(tmp_path / out)]
        assert main([*command, *more]) == 0
        said = capsys.readouterr().err
        assert ("made with threads 99, here" in said) == (out == "loud")
        assert bool(said) == (out == "loud")


def test_a_record_file_with_a_damaged_line_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "r.jsonl"
    command = gptq(model, tmp_path / "out", "--record", str(record), "-q")
    assert main(command) == 0
    record.write_text(record.read_text()[:-40])  # as a crash leaves it
    assert main(command) == 1
    assert f"{record}:1" in capsys.readouterr().err


def test_text_too_short_to_calibrate_says_how_many_sequences_it_has(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    assert main(gptq(model, tmp_path / "out", "--calibration", str(text), "-q")) == 1
    assert "--calibration-sequences" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["--recipe", "int4-gtpq"], "int4-gptq"),
        (["--recipe", "int4-gptq", "--calibraton", "x"], "--calibration"),
    ],
)
def test_a_slip_gets_a_suggestion_and_exit_code_two(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], suggestion: str
) -> None:
    assert main(["compress", str(model), "--out", str(tmp_path / "out"), *words]) == 2
    assert suggestion in capsys.readouterr().err


def test_plan_gives_numbers_and_refuses_what_does_not_fit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(write_recipe(tmp_path / "r.yaml"))
    assert main(["plan", str(model), "--recipe", recipe, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["output_bytes"] < row["input_bytes"]
    assert "int4-g32" in row["formats"]
    assert row["sampling_bytes"] > 0  # the model itself, to write its calibration text
    assert row["compress_peak_bytes"] > row["sampling_bytes"]
    monkeypatch.setattr("gossamer.checkpoint.memory.available_memory", lambda: 1000)
    assert main(["plan", str(model), "--recipe", recipe, "--quiet"]) == 1
    assert "memory" in capsys.readouterr().err


def test_compress_checks_the_fit_before_any_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.compress.pipeline.available_memory", lambda: 1000)
    assert main(gptq(model, tmp_path / "out", "-q")) == 1
    assert "--calibration" in capsys.readouterr().err
    assert not (tmp_path / "home" / "calibration").exists()
    assert not list(tmp_path.glob(".out*"))


def test_convert_makes_a_folder_that_transformers_loads(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["convert", str(model), "--out", str(tmp_path / "copy"), "-q"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").config.hidden_size == 64
    assert main(["convert", str(model), "--out", str(tmp_path / "copy"), "-q"]) == 1


def test_kill_minus_nine_of_the_command_then_the_same_command(model: Path, tmp_path: Path) -> None:
    """The real thing: a process of its own, SIGKILL as soon as it has finished a block, the same command again."""
    assert main(gptq(model, tmp_path / "whole", "-q")) == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gossamer", *gptq(model, out, "-q")]
    journal = tmp_path / ".out.work" / "journal.jsonl"
    process = subprocess.Popen(command)
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    for file in sorted(p.name for p in (tmp_path / "whole").iterdir()):
        assert (tmp_path / "whole" / file).read_bytes() == (out / file).read_bytes(), file
    assert not list(tmp_path.glob(".out*"))
