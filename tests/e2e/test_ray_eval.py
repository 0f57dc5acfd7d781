"""A text judged on a cluster: the serial record to the last bit, though command and node are killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.journal import Journal
from gossamer.cli import main
from ray_cluster import cluster_of, kill_a_busy_node, wait_until
from tiny_llama import make_folder

pytest.importorskip("ray", reason="needs Ray")

TIMES = {"seconds", "tokens_per_second"}
PLAN = ["--context", "48", "--stride", "40", "--scored", "24", "--tokens", "2208", "--samples", "1"]
SHARDS = 7


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(3) as cluster:
        yield cluster


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    results = {key: value for key, value in record["results"].items() if key not in TIMES}
    return {**record, "created": None, "results": results}


def the_record(file: Path) -> dict[str, Any]:
    (line,) = file.read_text().splitlines()
    return without_times(json.loads(line))


@pytest.mark.slow
def test_an_eval_that_loses_its_command_and_a_node_ends_as_the_serial_one(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = str(make_folder(tmp_path / "tiny", torch_dtype="bfloat16"))
    other = str(make_folder(tmp_path / "other", seed=1, torch_dtype="bfloat16"))
    command = ["eval", other, "--reference", tiny, *PLAN, "--quiet", "--out"]
    assert main([*command, str(tmp_path / "serial.jsonl")]) == 0

    on_cluster = [*command, str(tmp_path / "spread.jsonl"), "--ray", cluster.address]
    with subprocess.Popen([sys.executable, "-m", "gossamer", *on_cluster]) as process:
        wait_until(lambda: list(tmp_path.glob(".spread.jsonl.work/*/shard-*.json")), "a finished shard")
        process.kill()
    done = {line.stem for line in tmp_path.glob(".spread.jsonl.work/*/shard-*.json")}
    assert 0 < len(done) < SHARDS
    added: list[str] = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, unit, *rest: (added.append(unit), add(self, unit, *rest))[1])
    killed: list[Any] = []
    killer = threading.Thread(target=kill_a_busy_node, args=(cluster, "gossamer.measure.worker", killed))
    killer.start()
    assert main(on_cluster) == 0
    killer.join()
    assert killed, "no task was seen on any node"
    assert len(added) == len(set(added)) >= SHARDS - len(done)  # a file may be there whose line is not
    assert the_record(tmp_path / "spread.jsonl") == the_record(tmp_path / "serial.jsonl")
    assert the_record(tmp_path / "serial.jsonl")["results"]["kld_mean"] > 0
    assert not list(tmp_path.glob(".spread.jsonl.work*"))
