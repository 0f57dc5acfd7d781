"""`gossamer report`: data on stdout, talk on stderr, files where they were asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from gossamer.cli.report import report
from gossamer.errors import MeasureError


@pytest.fixture
def invoke(tmp_path: Path, made: ModuleType) -> Any:
    """Run the command on the made study."""
    app = typer.Typer()
    app.command()(report)
    made.write(tmp_path / "runs" / "study.jsonl", *made.study())

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [str(tmp_path / "runs"), *arguments], catch_exceptions=False)

    return run


def test_the_table_is_stdout_and_is_not_wrapped_when_piped(invoke: Any) -> None:
    result = invoke()
    assert result.exit_code == 0
    assert any(line.startswith("int4-gptq") and line.endswith("91.3") for line in result.stdout.splitlines())
    assert result.stderr == ""


def test_json_is_all_there_is_on_stdout(invoke: Any, tmp_path: Path) -> None:
    result = invoke("--json", "--markdown", str(tmp_path / "t.md"))
    assert len(json.loads(result.stdout)["rows"]) == 7
    assert re.search(rf"wrote {tmp_path / 't.md'} \([1-9]\d*\.\d kB\)", result.stderr)


def test_files_are_written_and_quiet_is_quiet(invoke: Any, tmp_path: Path) -> None:
    page, table = tmp_path / "new" / "r.html", tmp_path / "t.md"
    result = invoke("--html", str(page), "--markdown", str(table), "--title", "My <study>", "--quiet")
    assert result.stderr == ""
    assert "<title>My &lt;study&gt;</title>" in page.read_text()
    assert table.read_text().startswith("| Model |")


def test_a_broken_file_is_a_typed_error_and_nothing_is_printed(invoke: Any, tmp_path: Path) -> None:
    (tmp_path / "runs" / "broken.jsonl").write_text("{")
    with pytest.raises(MeasureError, match=r"broken\.jsonl:1: "):
        invoke("--html", str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def test_importing_the_report_loads_nothing_that_only_drawing_needs() -> None:
    code = "import sys, gossamer.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "plotly", "jinja2", "rich", "numpy"} & set(done.stdout.split())


def test_the_report_imports_nothing_of_gossamer_but_errors() -> None:
    code = "import sys, gossamer.report; print(*(m for m in sys.modules if m.startswith('gossamer.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    others = {name for name in done.stdout.split() if not name.startswith("gossamer.report")}
    assert others == {"gossamer.errors"}
