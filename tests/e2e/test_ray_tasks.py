"""A text judged and a model compressed on a cluster: what a serial command gives, to the last bit.

Each command is killed in the middle, and begun again; then a node is killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.journal import Journal
from gossamer.cli import main
from gossamer.measure.corpus import load_corpus
from ray_cluster import NODE, cluster_of, kill_a_busy_node, wait_until
from tiny_llama import make_folder

pytest.importorskip("ray", reason="needs Ray")

TIMES = {"seconds", "tokens_per_second"}
PLAN = ["--context", "48", "--stride", "40", "--scored", "24", "--tokens", "2208", "--samples", "1"]
SHARDS = 7
BLOCKS = 8
RECIPE = """
version: 1
name: narrower
calibration: {source: text.txt, sequences: 12, length: 32, seed: 0}
stages:
  - {method: wanda-sp, ratio: 0.25, heads: keep, multiple: 8}
  - {method: recover-local, inputs: teacher, tokens: 12800, patience: 1000}
  - {method: rtn, bits: 4, group_size: 8}
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with cluster_of(3) as cluster:
        yield cluster


@pytest.fixture
def cluster(nodes: Any) -> Any:
    """Three nodes, those that a test before has killed made anew."""
    while len(nodes.worker_nodes) < 3:
        nodes.add_node(**NODE)
    return nodes


def killed_once(command: list[str], begun: Callable[[], Any]) -> None:
    """Start a command, and kill it once it has begun."""
    with subprocess.Popen([sys.executable, "-m", "gossamer", *command]) as process:
        wait_until(lambda: begun() or process.poll() is not None, "what is to be killed")
        assert process.poll() is None
        process.kill()


def loses_a_node(cluster: Any, working: str, command: list[str]) -> int:
    """The exit code of a command, during which a node is killed that works on it."""
    killed: list[Any] = []
    killer = threading.Thread(target=kill_a_busy_node, args=(cluster, working, killed))
    killer.start()
    code = main(command)
    killer.join()
    assert killed, "no task was seen on any node"
    return code


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
    killed_once(on_cluster, lambda: list(tmp_path.glob(".spread.jsonl.work/*/shard-*.json")))
    done = {line.stem for line in tmp_path.glob(".spread.jsonl.work/*/shard-*.json")}
    assert 0 < len(done) < SHARDS
    added: list[str] = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, unit, *rest: (added.append(unit), add(self, unit, *rest))[1])
    assert loses_a_node(cluster, "gossamer.measure.worker", on_cluster) == 0
    assert len(added) == len(set(added)) >= SHARDS - len(done)  # a file may be there whose line is not
    assert the_record(tmp_path / "spread.jsonl") == the_record(tmp_path / "serial.jsonl")
    assert the_record(tmp_path / "serial.jsonl")["results"]["kld_mean"] > 0
    assert not list(tmp_path.glob(".spread.jsonl.work*"))


@pytest.mark.slow
def test_a_compression_that_loses_its_command_and_a_node_has_the_serial_bytes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(make_folder(tmp_path / "tiny", torch_dtype="bfloat16", num_hidden_layers=BLOCKS))
    Path("recipe.yaml").write_text(RECIPE)
    Path("text.txt").write_text(load_corpus("default").text[:20_000])
    command = ["compress", model, "--recipe", "recipe.yaml", "--json", "--quiet", "--out"]
    assert main([*command, "serial"]) == 0
    capsys.readouterr()

    on_cluster = [*command, "spread", "--ray", cluster.address]
    killed_once(on_cluster, lambda: list(tmp_path.glob(".spread.work/part-1/block-????.safetensors")))
    assert loses_a_node(cluster, "ray::_performed", on_cluster) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert 2 <= results["resumed_units"] <= BLOCKS  # the decision, and some blocks
    serial, spread = ({file.name: file.read_bytes() for file in Path(out).iterdir()} for out in ("serial", "spread"))
    assert spread == serial
    assert not list(tmp_path.glob(".spread*"))
