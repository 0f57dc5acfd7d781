"""`gossamer plan` on speed: what machines were described, what a step takes on them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.cli import main
from tiny_llama import make_folder

MACHINE = ["--memory-gbps", "1", "--compute-gmacs", "1"]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    model = make_folder(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=32)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nname: mine\nstages: [{method: rtn, bits: 8, group_size: 32}]\n")
    return ["plan", str(model), "--recipe", str(recipe)]


def row_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_process_is_bound_by_what_was_said_of_the_machine(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_of([*asked, *MACHINE, "--batch", "8", "--context", "16"], capsys)
    one, many = row["steps"]
    assert (one["batch"], many["batch"]) == (1, 8)
    assert one["tokens_per_s"] == pytest.approx(1 / one["step_s"])
    assert one["step_s"] == max(one["memory_s"], one["arithmetic_s"])
    assert many["arithmetic_s"] == pytest.approx(8 * one["arithmetic_s"])
    assert many["bottleneck"] == "compute"
    assert row["link_latency_us"] is None


def test_a_slow_network_is_what_ranks_on_two_machines_wait_for(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    two = [*asked, *MACHINE, "--tp", "2"]
    near = row_of(two, capsys)["steps"][0]
    far = row_of([*two, "--nodes", "2", "--link-latency-us", "1000", "--link-gbps", "1"], capsys)["steps"][0]
    assert far["bottleneck"] == "link latency"
    assert far["link_latency_s"] == pytest.approx(5 * 2 * 1e-3)  # two layers, two sums each, and the embedding's
    assert far["memory_s"] < near["memory_s"]
    assert main([*two, "--nodes", "2"]) == 0
    assert "machines" in capsys.readouterr().out


def test_what_nobody_said_is_measured_here(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    row = row_of(asked, capsys)
    assert row["memory_gbytes_per_s"] > 0
    assert row["compute_gmacs"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tp", "2", "--nodes", "4"], "nodes"),
        (["--nodes", "2"], "nodes"),
        (["--link-gbps", "10"], "--nodes"),
        (["--tp", "2", "--nodes", "2", "--link-latency-us", "-1"], "--link-latency-us"),
        (["--memory-gbps", "nan"], "--memory-gbps"),
        (["--compute-gmacs", "0"], "--compute-gmacs"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_machines_that_make_no_sense_are_refused(
    asked: list[str], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([*asked, *words]) == 2
    assert said in capsys.readouterr().err
