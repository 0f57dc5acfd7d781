"""The terminal table, the Markdown table and the JSON rows: same content, no foreign markup, nothing cut."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from gossamer.report import load, render_table, to_json, to_markdown
from gossamer.report.text import clean, divergence, number


@pytest.fixture
def rows_of(tmp_path: Path, made: ModuleType) -> Any:
    """Rows of these records, through a file."""
    return lambda *records: load([made.write(tmp_path / "r.jsonl", *records)])


def _printed(rows: Any, width: int) -> str:
    out = io.StringIO()
    render_table(rows, Console(file=out, width=width))
    return out.getvalue()


def test_a_row_shows_the_columns_of_the_survey(rows_of: Any, made: ModuleType) -> None:
    line = next(line for line in _printed(rows_of(*made.study()), 200).splitlines() if line.startswith("int4-gptq"))
    assert " ".join(line.split()) == (
        "int4-gptq int4-gptq 5.00 84.1 274 (84.1 + 46.1 kB) 26.5 670 74.5 188 14.02 0.0610 0.732 0.00321 91.3"
    )


def test_protocol_source_failure_and_units_stand_under_the_table(rows_of: Any, made: ModuleType) -> None:
    under = _printed(rows_of(*made.study()), 400).split("int8")[-1]
    for said in ("pydoc-topics (sha256 c0ffee00)", "context 1,024", "batch 1", "2 threads", "Example CPU",
                 "baseline is already 4-bit (Q4_1 GGUF)", "NaN in block 3 down", "MB is 10^6 bytes"):  # fmt: skip
        assert said in under


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_narrow_terminal_gets_several_tables_and_every_number(rows_of: Any, made: ModuleType, width: int) -> None:
    text = _printed(rows_of(*made.study()), width)
    assert max(len(line) for line in text.split("Quality: ")[0].splitlines()) <= width
    for value in ("5.00", "84.1 + 46.1 kB", "74.5", "188", "14.02", "0.0610", "91.3"):
        assert value in text
    assert "\u2026" not in text, "nothing is cut"


def test_terminal_escapes_and_markup_in_names_are_shown_and_not_obeyed(rows_of: Any, made: ModuleType) -> None:
    text = _printed(rows_of(made.bench(made.model("a\x1b[2J\r[bold]b[/bold]\u202e", recipe="[red]r[/]"))), 200)
    assert "[bold]b[/bold]" in text
    assert "[red]r[/]" in text
    assert not set("\x1b\r\u202e") & set(text)


def test_failed_and_unmeasured_cells_are_told_apart(rows_of: Any, made: ModuleType) -> None:
    text = _printed(rows_of(made.failed(made.evaluation(made.model("a")), "x")), 200)
    line = next(line for line in text.splitlines() if line.startswith("a failed"))
    assert line.split()[-4:] == ["failed"] * 4
    assert "\u2013" in line, "speed was not tried"


def test_markdown_has_the_same_numbers_and_notes(rows_of: Any, made: ModuleType) -> None:
    text = to_markdown(rows_of(*made.study()))
    assert "| int4-gptq | int4-gptq | 5.00 | 84.1 | 274 (84.1 + 46.1 kB) | 26.5 | 670 | 74.5 | 188 | 14.02 |" in text
    assert "- smollm2: baseline is already 4-bit (Q4\\_1 GGUF)." in text
    assert "- Failed: int2-kmeans" in text


def test_hostile_names_stay_in_their_markdown_cell(rows_of: Any, made: ModuleType) -> None:
    hostile = made.HOSTILE + "\n| injected | row |\n[x](javascript:alert(1))"
    text = to_markdown(rows_of(made.bench(made.model(hostile, recipe=hostile))))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {15}
    assert "<" not in text
    assert "](" not in text.replace("\\](", "")


def test_an_engine_column_appears_only_if_engines_differ(rows_of: Any, made: ModuleType) -> None:
    model = made.model("a")
    assert "Engine" not in to_markdown(rows_of(made.bench(model)))
    both = to_markdown(rows_of(made.bench(model), made.bench(model, engine={"name": "llama.cpp"})))
    assert "| Engine |" in both
    assert "| llama.cpp |" in both


def test_json_rows_are_one_line_with_plain_numbers(rows_of: Any, made: ModuleType) -> None:
    text = to_json(rows_of(*made.study()))
    assert text.isascii()
    assert "\n" not in text
    value = json.loads(text)
    row = next(row for row in value["rows"] if row["name"] == "int4-gptq")
    assert (row["wm_bytes"], row["rm_kv_bytes_per_token"], row["top1_agreement"]) == (84_100_000, 46080, 0.913)
    assert next(row for row in value["rows"] if row["failed"])["errors"] == {"eval": "NaN in block 3 down"}
    assert value["notes"]


def test_nan_is_said_and_keeps_json_valid(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("a"), float("inf")))
    assert json.loads(to_json(rows), parse_constant=pytest.fail)["rows"][0]["perplexity"] == "inf"
    assert "| inf |" in to_markdown(rows)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0612, "0.0612"), (0.5, "0.500"), (0.00004, "4.0e-05"), (12.34, "12.3"),
                        (1234.0, "1234"), (float("nan"), "NaN")]
)  # fmt: skip
def test_divergence_keeps_three_digits(value: float, text: str) -> None:
    assert divergence(value) == text


def test_numbers_and_text_are_made_safe() -> None:
    assert number(-float("inf"), 2) == "-inf"
    assert clean("a\nb\x00", keep="\n") == "a\nb\ufffd"
