"""Rows of one protocol carry no mark; rows of several are told apart, and the table says so."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.report.protocol import _letter, notes, protocols
from gossamer.report.records import read_records
from gossamer.report.rows import group


@pytest.fixture
def rows_of(tmp_path: Path, made: ModuleType) -> Any:
    """Rows of these records, through a file."""
    return lambda *records: group(read_records([made.write(tmp_path / "r.jsonl", *records)]))


def test_one_protocol_needs_no_marks_though_the_baseline_names_no_reference(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(*made.study())
    found = protocols(rows)
    assert [found.mark(i) for i in range(len(rows))] == [""] * len(rows)
    assert len(found.quality) == len(found.speed) == 1
    assert "reference smollm2" in found.quality[0].sentence


@pytest.mark.parametrize(
    "change",
    [{"corpus_sha256": "00" * 32}, {"context": 512}, {"stride": 512}, {"threads": 1},
     {"reference_fingerprint": "f-other"}, {"temperature": 0.7}],
)  # fmt: skip
def test_an_evaluation_that_differs_in_anything_is_marked_and_the_difference_named(
    rows_of: Any, made: ModuleType, change: dict[str, Any]
) -> None:
    rows = rows_of(made.evaluation(made.model("smollm2")),
                   made.evaluation(made.model("x", 60, recipe="x"), 14, 0.1, 0.9),
                   made.evaluation(made.model("y", 70, recipe="y"), 14, 0.1, 0.9, protocol=change))  # fmt: skip
    found = protocols(rows)
    marks = {row.label: found.mark(i) for i, row in enumerate(rows)}
    assert marks["x"] != marks["y"]
    assert set(marks.values()) == {"a", "b"}
    key = next(iter(change)).removesuffix("_fingerprint")
    assert any(line.startswith("Quality: not one protocol") and key in line for line in notes(rows))


@pytest.mark.parametrize("change", [{"batch": 8}, {"prompt_tokens": 16}, {"threads": 1}, {"repetitions": 1}])
def test_a_bench_that_differs_is_marked_by_a_number(rows_of: Any, made: ModuleType, change: dict[str, Any]) -> None:
    rows = rows_of(made.bench(made.model("a", 10)), made.bench(made.model("b", 20), protocol=change))
    assert [protocols(rows).marks(i) for i in range(2)] == [("", "1"), ("", "2")]


def test_another_machine_is_another_protocol_for_speed_and_not_for_quality(rows_of: Any, made: ModuleType) -> None:
    other = {**made.BASE["machine"], "cpu": "Other CPU"}
    a, b = made.model("a", 10), made.model("b", 20)
    rows = rows_of(made.evaluation(a), made.bench(a), made.evaluation(b, machine=other), made.bench(b, machine=other))
    assert [protocols(rows).marks(i) for i in range(2)] == [("", "1"), ("", "2")]


def test_a_run_that_failed_before_its_protocol_was_known_has_no_mark(rows_of: Any, made: ModuleType) -> None:
    lost = made.failed(made.bench(made.model("b", 20)), "no such engine")
    lost["protocol"] = {}
    rows = rows_of(made.bench(made.model("a", 10)), lost)
    assert len(protocols(rows).speed) == 1


def test_the_notes_say_source_failure_and_what_is_not_shown(rows_of: Any, made: ModuleType) -> None:
    records = made.study()
    lines = notes(rows_of(*records, {**records[0], "created": "2020-01-01T00:00:00Z"}))
    assert "smollm2: baseline is already 4-bit (Q4_1 GGUF)." in lines
    assert "Failed: int2-kmeans: eval: NaN in block 3 down" in lines
    assert "1 older record is not shown: the newest counts." in lines


def test_a_note_that_does_not_say_baseline_is_said_of_the_baseline(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("smollm2", note="stored as Q4_1 (GGUF): already 4-bit")))
    assert "Baseline smollm2: stored as Q4_1 (GGUF): already 4-bit." in notes(rows)


def test_marks_go_on_after_z() -> None:
    assert [_letter(n) for n in (1, 26, 27, 52, 53, 703)] == ["a", "z", "aa", "az", "ba", "aaa"]


def test_what_is_made_from_a_baseline_in_the_table_does_not_repeat_its_note(rows_of: Any, made: ModuleType) -> None:
    note = "stored as Q4_1 (GGUF): already 4-bit"
    base = made.evaluation(made.model("smollm2", note=note))
    small = made.evaluation(made.model("small", 20, "int4-gptq", note=f"made from a baseline {note}"))
    assert sum("already 4-bit" in line for line in notes(rows_of(base, small))) == 1
    said = "small: made from a baseline whose weights come from a Q4_1 GGUF file, so they are already 4-bit."
    assert said in notes(rows_of(small))


def test_a_baseline_that_was_converted_does_not_claim_to_be_stored_in_few_bits(rows_of: Any, made: ModuleType) -> None:
    note = "stored as Q4_1 (GGUF): already 4-bit"
    said = "Baseline m: weights come from a Q4_1 GGUF file, so they are already 4-bit; held here as"
    for form, held in (("bf16", "bf16."), (None, "16-bit floats.")):
        model = made.model("m", note=note, bits_per_weight=16.0, format=form)
        assert f"{said} {held}" in notes(rows_of(made.evaluation(model)))


def test_perplexities_over_different_tokens_are_different_protocols(rows_of: Any, made: ModuleType) -> None:
    def judged(name: str, size: int, tokens: str | None) -> Any:
        protocol = {} if tokens is None else {"tokens_sha256": tokens, "tokens": 9, "samples": size}
        return made.evaluation(made.model(name, size), protocol=protocol)

    one = rows_of(judged("a", 1, "aa"), judged("b", 2, None), judged("c", 3, "aa"))
    assert [protocols(one).mark(i) for i in range(3)] == [""] * 3, "what an older record does not say is no difference"
    assert any("(token ids aa)" in line for line in notes(one))
    two = rows_of(judged("a", 1, "aa"), judged("b", 2, "bb"), judged("c", 3, None))
    assert [protocols(two).mark(i) for i in range(3)] == ["a", "b", "c"], "and of two protocols it may be either"
    assert any(line.startswith("Quality: not one protocol (differs in tokens_sha256)") for line in notes(two))


def test_kernels_of_two_instruction_sets_are_two_protocols(rows_of: Any, made: ModuleType) -> None:
    def ran(name: str, size: int, kernels: str | None) -> Any:
        return made.bench(made.model(name, size), engine={**made.BASE["engine"], "kernels": kernels})

    rows = rows_of(ran("a", 1, "avx512"), ran("b", 2, "portable"), ran("c", 3, "avx512"))
    assert [protocols(rows).mark(i) for i in range(3)] == ["1", "2", "1"]
    assert any("portable kernels" in line for line in notes(rows))
    older = rows_of(ran("a", 1, "avx512"), ran("b", 2, None))
    assert [protocols(older).mark(i) for i in range(2)] == ["", ""]


def test_a_run_that_failed_before_it_knew_its_tokens_is_no_protocol_of_its_own(rows_of: Any, made: ModuleType) -> None:
    unknown = {"windows": None, "tokens_scored": None, "reference": "smollm2", "reference_fingerprint": None}
    lost = made.failed(made.evaluation(made.model("x", 60, recipe="x"), protocol=unknown), "no room")
    rows = rows_of(*made.study(), lost)
    assert len(protocols(rows).quality) == 1


def test_labels_leave_out_the_folder_that_all_models_share(rows_of: Any, made: ModuleType) -> None:
    names = ["runs/demo/a", "runs/demo/ab/c"]
    labels = {row.label for row in rows_of(*(made.evaluation(made.model(name)) for name in names))}
    assert labels == {"a", "ab/c"}
    assert {row.label for row in rows_of(made.evaluation(made.model(names[0])))} == {"runs/demo/a"}
