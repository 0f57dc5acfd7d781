"""`gossamer convert`: a folder that can be opened, and a message that shows its name as it is."""

from __future__ import annotations

import json

import pytest

from gossamer.checkpoint import open_checkpoint
from gossamer.cli import main


@pytest.mark.parametrize("name", ["plain", "conv[bold]x", "c[/b]", "a:smile:b"])
def test_the_folder_is_named_as_it_is(tiny_model, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny_model), "--out", name]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{name}: ")
    assert open_checkpoint(tmp_path / name).weight_bytes() == open_checkpoint(tiny_model).weight_bytes()


def test_json_is_one_record_and_quiet_is_silent(tiny_model, tmp_path, capsys):
    assert main(["convert", str(tiny_model), "--out", str(tmp_path / "a"), "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["path"] == str(tmp_path / "a")
    assert err == ""


def test_a_folder_that_exists_is_not_written_over(tiny_model, tmp_path, capsys):
    assert main(["convert", str(tiny_model), "--out", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
