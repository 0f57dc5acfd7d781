"""A sweep on a cluster of several nodes: the serial one's table and bytes, though a node is killed in the middle."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli import main
from ray_cluster import cluster_of, kill_a_busy_node
from tiny_llama import make_folder

pytest.importorskip("ray", reason="needs Ray")

SMALL = ["--context", "48", "--tokens", "200", "--prompt-tokens", "16", "--output-tokens", "4", "--repetitions", "1"]
TIMES = {"decode", "prefill", "made_seconds", "made_bytes"}
"""What of a row is a time, or the memory that a process happened to take."""
NAMES = [f"{bits}-g{size}" for bits in (8, 6, 5, 4, 3, 2) for size in (32, 16)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("models") / "tiny", torch_dtype="bfloat16"))


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    files = []
    for name in NAMES:
        bits, size = name.split("-g")
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(
            f"version: 1\nname: {name}\nstages:\n  - {{method: rtn, bits: {bits}, group_size: {size}}}\n"
        )
    return [str(file) for file in files]


def table(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The rows that were printed, without their times."""
    rows = json.loads(capsys.readouterr().out)["rows"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def whose(file: Path) -> list[tuple[str, str]]:
    """What each record is of."""
    records = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert all(record["status"] == "ok" for record in records)
    return sorted((record["kind"], record["model"]["fingerprint"]) for record in records)


@pytest.mark.slow
def test_a_sweep_of_twelve_that_loses_a_node_ends_as_the_serial_one(
    cluster: Any, tiny: str, recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serial, spread = tmp_path / "serial", tmp_path / "spread"
    assert main(["sweep", tiny, *recipes, "--out", str(serial), *SMALL, "--json", "--quiet"]) == 0
    expected = table(capsys)

    assert main(["sweep", tiny, recipes[0], "--out", str(spread), *SMALL, "--quiet"]) == 0
    begun = (spread / "sweep.jsonl").read_bytes()
    capsys.readouterr()
    killed: list[Any] = []
    killer = threading.Thread(target=kill_a_busy_node, args=(cluster, "gossamer.measure.worker", killed))
    killer.start()
    command = ["sweep", tiny, *recipes, "--out", str(spread), *SMALL, "--json", "--quiet"]
    assert main([*command, "--ray", cluster.address]) == 0
    killer.join()
    assert killed, "no task was seen on any node"
    assert table(capsys) == expected
    assert (spread / "sweep.jsonl").read_bytes().startswith(begun)  # what was measured before is not measured again
    assert whose(spread / "sweep.jsonl") == whose(serial / "sweep.jsonl")
    assert len(expected) == 1 + len(NAMES) == 13
    for name in NAMES:
        made, again = ((folder / "models" / name / "model.safetensors") for folder in (serial, spread))
        assert made.read_bytes() == again.read_bytes()

    before = (spread / "sweep.jsonl").read_bytes()
    assert main(command) == 0  # and a serial run finds nothing left to do
    assert (spread / "sweep.jsonl").read_bytes() == before
    assert table(capsys) == expected


@pytest.mark.slow
def test_a_recipe_that_cannot_be_made_is_a_failed_row_and_the_others_go_on(
    cluster: Any, recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = str(make_folder(tmp_path / "odd", intermediate_size=40))  # groups of 32 do not divide it
    out = str(tmp_path / "o")
    assert main(["sweep", odd, recipes[0], "--out", out, *SMALL, "--quiet", "--ray", cluster.address]) == 1
    assert "making it failed: ShapeMismatch" in capsys.readouterr().out


def test_more_threads_than_any_node_has_is_said_at_once(
    cluster: Any, tiny: str, recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", tiny, recipes[0], "--out", str(tmp_path / "o"), "--quiet", "--threads", "2"]
    assert main([*command, "--ray", cluster.address]) == 1
    assert "each task takes 2 CPUs, and the largest node of the cluster has 1" in capsys.readouterr().err
