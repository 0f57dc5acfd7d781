"""What `--ray` means on a command line, and what is said where no cluster can be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gossamer.cli import main
from gossamer.cli._app import _take_any_cluster
from gossamer.cluster.join import joined
from gossamer.errors import ClusterError
from tiny_llama import make_folder


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["sweep", "m", "r", "--ray"], ["sweep", "m", "r", "--ray=auto"]),
        (["sweep", "m", "--ray", "r", "--out", "o"], ["sweep", "m", "--ray=auto", "r", "--out", "o"]),
        (["sweep", "m", "--ray", "--out", "o"], ["sweep", "m", "--ray=auto", "--out", "o"]),
        (["serve", "m", "--ray", "host:6379"], ["serve", "m", "--ray", "host:6379"]),
        (["serve", "m", "--ray", "[::1]:6379"], ["serve", "m", "--ray", "[::1]:6379"]),
        (["serve", "--ray", "local", "m"], ["serve", "--ray", "local", "m"]),
        (["serve", "m", "--ray=a:1"], ["serve", "m", "--ray=a:1"]),
        (["run", "m", "--", "--ray"], ["run", "m", "--", "--ray"]),
    ],
)
def test_an_address_behind_the_option_may_be_left_out(given: list[str], taken: list[str]) -> None:
    _take_any_cluster(given)
    assert given == taken


def test_without_ray_the_command_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    model, made = str(make_folder(tmp_path / "tiny")), ["--out", str(tmp_path / "o")]
    sweep, compress = ["sweep", model, "int4-rtn", *made], ["compress", model, "--recipe", "int4-rtn", *made]
    for command in (sweep, compress, ["eval", model]):
        assert main([*command, "--ray", "--quiet"]) == 1
        said = capsys.readouterr().err
        assert "Ray is not installed" in said
        assert "pip install 'gossamer[ray]'" in said


def test_a_recipe_whose_blocks_wait_for_each_other_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(make_folder(tmp_path / "tiny"))
    assert main(["compress", model, "--recipe", "int4-gptq", "--out", str(tmp_path / "o"), "--ray"]) == 2
    assert "recipe int4-gptq has only stages whose blocks wait for each other: gptq" in capsys.readouterr().err


def test_nodes_of_ranks_and_a_cluster_are_not_both_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "m", "--nodes", "2", "--master-addr", "127.0.0.1", "--ray"]) == 2
    assert "--nodes and --ray" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="part of no Ray cluster") as caught, joined("auto"):
        pass
    assert "ray start --head" in str(caught.value)
    assert not ray.is_initialized()
