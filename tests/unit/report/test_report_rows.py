"""Grouping records to rows: one per model and engine, the newest record of a kind, failures kept."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.report.records import read_records
from gossamer.report.rows import Row, group, reference_of


@pytest.fixture
def rows_of(tmp_path: Path, made: ModuleType) -> Any:
    """Rows of these records, through a file."""
    return lambda *records: group(read_records([made.write(tmp_path / "r.jsonl", *records)]))


def _find(rows: list[Row], label: str) -> Row:
    return next(row for row in rows if row.label == label)


def test_eval_bench_and_compress_of_one_model_are_one_row(rows_of: Any, made: ModuleType) -> None:
    model = made.model("int4", 60, recipe="int4-gptq")
    (row,) = rows_of(made.evaluation(model, 14, 0.1, 0.9), made.bench(model, 50), made.compression(model))
    assert (row.perplexity, row.decode_tokens_per_s, len(row.compression.results.layers)) == (14, 50, 210)


@pytest.mark.parametrize("order", [1, -1])
def test_the_newest_record_of_a_kind_wins_wherever_it_stands(rows_of: Any, made: ModuleType, order: int) -> None:
    model = made.model("a")
    records = [made.evaluation(model, 10, created="2026-01-02T00:00:00+02:00"),
               made.evaluation(model, 11, created="2026-01-01T23:00:00Z"),
               made.evaluation(model, 12, created="2025-12-31T00:00:00")]  # fmt: skip
    (row,) = rows_of(*records[::order])
    assert row.perplexity == 11, "times of different zones are compared as instants"
    assert row.superseded == 2


def test_of_two_records_of_one_instant_the_later_line_wins(rows_of: Any, made: ModuleType) -> None:
    (row,) = rows_of(made.evaluation(made.model("a"), 10), made.evaluation(made.model("a"), 11))
    assert row.perplexity == 11


def test_a_failed_run_stays_a_row_with_its_reason(rows_of: Any, made: ModuleType) -> None:
    model = made.model("int2", 30, recipe="int2")
    rows = rows_of(made.evaluation(made.model("smollm2")), made.failed(made.bench(model), "out of memory"))
    row = _find(rows, "int2")
    assert row.failed
    assert row.failures[0].error == "out of memory"
    assert row.size_bytes == 30_000_000, "what is known of the model is shown although the run failed"


def test_a_newer_failure_is_not_hidden_by_an_older_success(rows_of: Any, made: ModuleType) -> None:
    good = made.bench(made.model("a"), created="2026-01-01T00:00:00Z")
    bad = made.failed(made.bench(made.model("a"), created="2026-01-02T00:00:00Z"), "killed")
    (row,) = rows_of(bad, good)
    assert row.failed


def test_a_failure_before_the_fingerprint_joins_the_only_model_of_its_name(rows_of: Any, made: ModuleType) -> None:
    model = made.model("a")
    early = made.failed(made.bench({**model, "fingerprint": None}), "no such engine")
    (row,) = rows_of(made.evaluation(model), early)
    assert row.failed
    assert row.fingerprint == "f-a"


def test_two_models_of_one_name_are_two_rows_told_apart(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("a", fingerprint="sha256:1111111aa")),
                   made.evaluation(made.model("a", fingerprint="2222222bb")))  # fmt: skip
    assert {row.label for row in rows} == {"a @1111111", "a @2222222"}


def test_each_engine_is_a_row_and_shares_the_evaluation_of_the_weights(rows_of: Any, made: ModuleType) -> None:
    model = made.model("a")
    llama = {"name": "llama.cpp", "version": "b4000"}
    rows = rows_of(made.evaluation(model, 12), made.bench(model, 30), made.failed(made.bench(model, engine=llama), "x"))
    assert [(row.engine, row.perplexity, row.failed) for row in rows] == [
        ("gossamer 0.1.0 (reference, float32)", 12, False),
        ("llama.cpp b4000", 12, True),
    ]


def test_an_engine_that_was_evaluated_itself_keeps_its_own_quality(rows_of: Any, made: ModuleType) -> None:
    model, llama = made.model("a"), {"name": "llama.cpp"}
    rows = rows_of(made.evaluation(model, 12), made.bench(model), made.bench(model, engine=llama),
                   made.evaluation(model, 12.5, engine=llama))  # fmt: skip
    assert {row.engine.split()[0]: row.perplexity for row in rows} == {"gossamer": 12, "llama.cpp": 12.5}


def test_the_baseline_is_first_and_then_rows_go_by_size(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(*made.study())
    assert [row.label for row in rows] == [
        "smollm2", "int2-kmeans", "int3-gptq", "int4-gptq", "int4-rtn", "prune-20", "int8"
    ]  # fmt: skip
    assert [row.baseline for row in rows] == [True] + [False] * 6


def test_the_baseline_is_the_model_of_the_fingerprint_not_of_the_name(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("smollm2")), made.evaluation(made.model("smollm2", fingerprint="other")),
                   made.evaluation(made.model("int4", 60, recipe="int4"), 14, 0.1, 0.9))  # fmt: skip
    assert [row.fingerprint for row in rows if row.baseline] == ["f-smollm2"]
    assert reference_of(_find(rows, "int4"), rows).fingerprint == "f-smollm2"


def test_without_any_reference_the_base_names_the_baseline(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.bench(made.model("int4", 60, recipe="int4")), made.bench(made.model("smollm2")))
    assert [row.label for row in rows if row.baseline] == ["smollm2"]


def test_a_baseline_compared_with_itself_is_still_the_baseline(rows_of: Any, made: ModuleType) -> None:
    (row,) = rows_of(made.evaluation(made.model("smollm2"), 12, 0.0, 1.0))
    assert row.baseline
    assert reference_of(row, [row]) is None
