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


def test_each_bench_protocol_is_a_row_beside_the_one_evaluation(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a")
    rows = rows_of(made.evaluation(a, 12), *(made.bench(a, n, {"batch": n}) for n in (16, 8, 1)))
    assert [(row.decode_tokens_per_s, row.perplexity) for row in rows] == [(1, 12), (8, 12), (16, 12)]
    assert sum(row.superseded for row in rows) == 0


def test_only_a_record_of_the_same_protocol_is_superseded(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a")
    old = [made.bench(a, n, {"batch": n}, created="2026-01-01T00:00:00Z") for n in (1, 8)]
    rows = rows_of(*old, made.bench(a, 2, created="2026-01-02T00:00:00Z"))
    assert [row.decode_tokens_per_s for row in rows] == [2, 8]
    assert [row.superseded for row in rows] == [1, 0]


def test_every_evaluation_is_shown_and_speeds_stand_beside_each(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a")
    rows = rows_of(
        made.bench(a, 30), *(made.evaluation(a, n, protocol={"corpus": c}) for n, c in ((12, "p"), (9, "w")))
    )
    assert sorted((row.perplexity, row.decode_tokens_per_s) for row in rows) == [(9, 30), (12, 30)]


def test_a_bench_stands_beside_the_evaluation_of_weights_held_as_its_own(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a")
    kinds = [{"weights": "float"}, {"weights": "stored"}]
    rows = rows_of(*(made.bench(a, 10 + i, kind) for i, kind in enumerate(kinds)),
                   *(made.evaluation(a, 20 + i, protocol=kind) for i, kind in enumerate(kinds)))  # fmt: skip
    assert [(row.decode_tokens_per_s, row.perplexity) for row in rows] == [(10, 20), (11, 21)]


def test_an_evaluation_in_an_engine_without_a_bench_borrows_no_speed(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a")
    rows = rows_of(made.bench(a, 30), made.evaluation(a, 12), made.evaluation(a, 13, engine={"name": "llama.cpp"}))
    assert [(row.perplexity, row.decode_tokens_per_s) for row in rows] == [(12, 30), (13, None)]


@pytest.mark.parametrize("order", [1, -1])
def test_an_evaluation_without_reference_adds_nothing_to_the_same_one_with_it(
    rows_of: Any, made: ModuleType, order: int
) -> None:
    a = made.model("a", 60, recipe="a")
    (row,) = rows_of(*[made.evaluation(a, 12, 0.1, 0.9), made.evaluation(a, 12)][::order])
    assert row.kld_mean == 0.1
    assert len(rows_of(made.evaluation(a, 12, 0.1, 0.9), made.evaluation(a, 12, protocol={"context": 9}))) == 2


def test_a_later_success_replaces_a_failure_that_did_not_know_its_tokens(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a", 60, recipe="a")
    unknown = {"windows": None, "tokens_scored": None, "reference": "smollm2", "reference_fingerprint": None}
    early = made.failed(made.evaluation(a, protocol=unknown, created="2026-01-01T00:00:00Z"), "no room")
    (row,) = rows_of(early, made.evaluation(a, 12, 0.1, 0.9))
    assert not row.failed


def test_one_model_typed_in_several_ways_is_one_row(rows_of: Any, made: ModuleType) -> None:
    names = ["./small/", "small", "small/", "/home/me/runs/small"]
    models = [made.model(name, 60, recipe="r", fingerprint="f") for name in names]
    early = made.failed(made.compression({**models[0], "fingerprint": None}, created="2026-01-01T00:00:00Z"), "x")
    (row,) = rows_of(made.evaluation(models[0], 12), made.bench(models[1], 30), made.compression(models[2]),
                     made.bench(models[3], 31), early)  # fmt: skip
    assert (row.label, row.perplexity, row.decode_tokens_per_s, row.failed) == ("small", 12, 31, False)


def test_a_reference_is_found_under_any_name_of_its_model(rows_of: Any, made: ModuleType) -> None:
    by_name = {"reference": "./runs/base/", "reference_fingerprint": None}
    base = [made.model(name, fingerprint="f") for name in ("base", "runs/base")]
    rows = rows_of(
        *map(made.bench, base), made.evaluation(made.model("x", 60, recipe="x"), 14, 0.1, 0.9, protocol=by_name)
    )
    assert reference_of(_find(rows, "x"), rows).label == "base"


def test_the_base_is_found_by_fingerprint_or_by_the_last_part_of_its_path(rows_of: Any, made: ModuleType) -> None:
    known = made.model("int4", 60, recipe="int4", base="smollm2", base_fingerprint="f-1")
    wanted, other = made.model("runs/smollm2", fingerprint="f-1"), made.model("smollm2", fingerprint="f-2")
    rows = rows_of(*map(made.bench, (known, wanted, other)))
    assert [row.fingerprint for row in rows if row.baseline] == ["f-1"]
    rows = rows_of(*map(made.bench, ({**known, "base_fingerprint": None}, wanted)))
    assert [row.fingerprint for row in rows if row.baseline] == ["f-1"]
