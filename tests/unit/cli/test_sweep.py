"""`gossamer sweep` from the command line to its files, on a model of no size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.cli import main
from tiny_llama import make_folder

SMALL = ["--context", "48", "--tokens", "200", "--prompt-tokens", "16", "--output-tokens", "4", "--repetitions", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("models") / "tiny", torch_dtype="bfloat16"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GOSSAMER_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def recipe(folder: Path, name: str, bits: int, file: str | None = None) -> str:
    """A YAML file with a recipe of one stage."""
    path = folder / f"{file or name}.yaml"
    path.write_text(f"version: 1\nname: {name}\nstages:\n  - {{method: rtn, bits: {bits}, group_size: 32}}\n")
    return str(path)


@pytest.mark.slow
def test_recipes_end_in_one_table_and_what_is_measured_is_not_measured_again(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "swept"
    # A recipe may have a name that means something else to a study of formats.
    files = [recipe(tmp_path, "coarse", 3), recipe(tmp_path, "kv-int8", 8)]
    command = ["sweep", tiny, *files, "--out", str(out), *SMALL, "--quiet"]
    assert main([*command, "--max-kld", "100"]) == 0
    assert "Take coarse: " in (printed := capsys.readouterr().out)
    assert "2 of 2 recipes keep to a KL divergence of at most 100" in printed
    page = (out / "sweep.md").read_text()
    assert page.startswith("# Recipes, compared")
    assert "(sweep.svg)" in page
    before = (out / "sweep.jsonl").read_bytes()
    assert [json.loads(line)["kind"] for line in before.splitlines()] == ["compress"] * 2 + ["eval"] * 3 + ["bench"] * 3
    assert main([*command, "--json"]) == 0
    assert (out / "sweep.jsonl").read_bytes() == before
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows[1:]] == ["coarse", "kv-int8"]
    assert rows[1]["kld"] > rows[2]["kld"] > 0
    assert (out / "models" / "coarse" / "gossamer.json").exists()


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        (["one", "other"], "two different recipes are named 'one'"),
        (["int4-rtm"], "did you mean 'int4-rtn'"),
        (["one", "--batch", "0"], "batch is 0"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    recipes: list[str], message: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"one": recipe(tmp_path, "one", 4), "other": recipe(tmp_path, "one", 3, file="other")}
    assert main(["sweep", tiny, *(known.get(name, name) for name in recipes), "--out", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
