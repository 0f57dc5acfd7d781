"""`gossamer simulate`: what it prints, what it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.cli import main
from gossamer.simulate.cost import StepCost, read_cost, write_cost
from tiny_llama import make_folder

SMALL = ["--requests", "30", "--input-tokens", "40:20", "--output-tokens", "8:4"]


@pytest.fixture
def cost(tmp_path: Path) -> str:
    write_cost(tmp_path / "cost.json", StepCost(0.01, 0.0005, 0.002, 1e-6, about={"model": "small"}))
    return str(tmp_path / "cost.json")


def test_a_simulation_prints_one_json_line_with_all_that_went_in(cost: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--replicas", "3", "--rate", "20", "--shared-prefix", "32", "--prefixes", "2", "--routing", "prefix"]
    assert main(["simulate", "--cost", cost, *SMALL, *words, "--goodput", "ttft:500", "--json", "-q"]) == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out)
    assert printed.err == ""
    assert row["kind"] == "simulation"
    assert row["cost"]["about"] == {"model": "small"}
    assert (row["fleet"]["replicas"], row["fleet"]["routing"]) == (3, "prefix")
    assert (row["load"]["request_rate"], row["load"]["prefixes"]) == (20.0, 2)
    results = row["results"]
    assert results["completed"] == 30
    assert set(results["ttft_s"]) == {"mean", "median", "p90", "p99"}
    assert 0 < results["utilisation"] <= 1
    assert 0 < results["prefix_hit_rate"] < 1
    assert results["goodput"]["share"] > 0


def test_a_table_is_shown_and_an_overload_is_said(cost: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--cost", cost, *SMALL, "--rate", "10000"]) == 0
    printed = capsys.readouterr()
    assert "prefix hits" in printed.out
    assert "TTFT" in printed.out
    assert "small" in printed.out
    assert "always busy" in printed.err


def test_a_trace_is_taken_as_it_is(cost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"arrival": i / 10, "input_tokens": 30, "output_tokens": 5} for i in range(20)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["simulate", "--cost", cost, "--trace", str(trace), "--json", "-q"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["load"] == {"trace": "trace.jsonl", "requests": 20}
    assert row["results"]["output_tokens"]["total"] == 100


def test_a_model_is_measured_and_its_cost_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("gossamer.simulate.measure.LEVELS", (1, 3))
    model = make_folder(tmp_path / "model")
    kept = tmp_path / "cost.json"
    assert main(["simulate", "--measure", str(model), "--cost", str(kept), *SMALL, "--json", "-q"]) == 0
    row = json.loads(capsys.readouterr().out)
    found = read_cost(kept)
    assert row["cost"]["step_s"] == found.step_s
    assert found.about["model"] == str(model)
    assert found.about["steps"] > 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "3", "--concurrency", "2"], "three ways"),
        (["--rate", "0"], "rate"),
        (["--concurrency", "0"], "concurrency"),
        (["--replicas", "0"], "replicas"),
        (["--routing", "prefx"], "routing"),
        (["--input-tokens", "5:9"], "length"),
        (["--prefixes", "0"], "prefixes"),
        (["--kv-tokens", "0"], "kv_tokens"),
        (["--router-us", "-1"], "router"),
        (["--trace", "/no/such/file"], "/no/such/file"),
        (["--cost", "/no/such/cost"], "/no/such/cost"),
        (["--goodput", "ttft"], "ttft"),
    ],
)
def test_what_makes_no_sense_gets_exit_code_two(
    cost: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--cost", cost, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_cost_must_come_from_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate"]) == 2
    assert "--measure" in capsys.readouterr().err


def test_a_request_that_no_replica_holds_is_named_with_a_way_out(cost: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--cost", cost, "--kv-tokens", "128"]) == 1
    assert "KV cache" in capsys.readouterr().err


def test_no_torch_is_loaded(cost: str) -> None:
    code = (
        "import sys\nfrom gossamer.cli import main\n"
        f"assert main(['simulate', '--cost', {cost!r}, '--requests', '5', '--json', '-q']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
