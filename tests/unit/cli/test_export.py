"""`gossamer export`: one line of what was proved, one JSON record, and exit codes."""

from __future__ import annotations

import json

from exports import make_artifact
from gossamer.cli import main
from gossamer.formats import Codebook, Integer


def test_it_says_what_was_proved_and_by_whom(tmp_path, capsys) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    assert main(["export", str(model), "--to", "awq", "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "20 tensors read back by" in err
    assert "all exact" in err


def test_json_is_one_record_and_quiet_is_silent(tmp_path, capsys) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    words = ["export", str(model), "--to", "gptq", "--out", str(tmp_path / "out"), "--no-verify", "--json", "-q"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["weights"] == "not verified"
    assert err == ""


def test_a_refusal_names_the_way_out(tmp_path, capsys) -> None:
    model = make_artifact(tmp_path / "m", Codebook("nf4", 64))
    assert main(["export", str(model), "--to", "gguf", "--out", str(tmp_path / "m.gguf")]) == 1
    assert "--allow-rounding" in capsys.readouterr().err
    assert main(["export", str(model), "--to", "gguff", "--out", str(tmp_path / "m.gguf")]) == 2
    assert "'gguf'" in capsys.readouterr().err
