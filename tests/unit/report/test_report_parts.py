"""The headline, the samples and the sensitivity of the layers: computed from the rows, and from nothing else."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.report import load
from gossamer.report.headline import headline
from gossamer.report.samples import departure, prompts
from gossamer.report.sensitivity import heat_maps


@pytest.fixture
def rows_of(tmp_path: Path, made: ModuleType) -> Any:
    """Rows of these records, through a file."""
    return lambda *records: load([made.write(tmp_path / "r.jsonl", *records)])


def _say(rows: Any) -> str:
    return headline(rows)[0].replace("\u2019", "'")


def test_the_headline_is_the_smallest_model_that_keeps_enough(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(*made.study())
    assert _say(rows) == (
        "int4-gptq keeps 91% top-1 agreement in 58% of the baseline's size and decodes 1.8 times as fast"
    )
    assert "at least 90%" in headline(rows)[1]


def test_where_none_keeps_enough_the_headline_says_so(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("smollm2")),
                   made.evaluation(made.model("x", 300, recipe="x"), 14, 1, 0.5))  # fmt: skip
    assert _say(rows) == "x keeps 50% top-1 agreement at 3.0 times the baseline's size"
    assert "no model here keeps 90%" in headline(rows)[1]


def test_agreement_is_never_rounded_up_to_all_of_it(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("smollm2")),
                   made.evaluation(made.model("x", 50, recipe="x"), 12, 0, 0.999))  # fmt: skip
    assert "keeps 99% top-1" in _say(rows)


def test_the_headline_compares_no_speed_across_protocols(rows_of: Any, made: ModuleType) -> None:
    base, x = made.model("smollm2"), made.model("x", 50, recipe="x")
    same = [made.evaluation(base), made.bench(base, 10), made.evaluation(x, 14, 0.1, 0.95)]
    assert "2.0 times as fast" in _say(rows_of(*same, made.bench(x, 20)))
    assert "fast" not in _say(rows_of(*same, made.bench(x, 20, protocol={"threads": 1})))


def test_without_a_divergence_the_headline_speaks_of_perplexity(rows_of: Any, made: ModuleType) -> None:
    base, x = made.evaluation(made.model("smollm2"), 12), made.model("x", 60, recipe="x")
    assert _say(rows_of(base, made.evaluation(x, 14))) == (
        "x reaches perplexity 14.00 against the baseline's 12.00 in 60% of its size"
    )
    other = made.evaluation(x, 14, protocol={"context": 256})
    assert _say(rows_of(base, other)) == "smollm2: 100 MB of weights, perplexity 12.00"


def test_a_size_against_a_baseline_whose_source_was_smaller_says_what_it_is_held_as(
    rows_of: Any, made: ModuleType
) -> None:
    note = "stored as Q4_1 (GGUF): already 4-bit"
    base = made.model("smollm2", note=note, bits_per_weight=16.0, format="bf16")
    x = made.model("x", 50, recipe="x")
    assert "in 50% of the bf16 baseline's size" in _say(
        rows_of(made.evaluation(base), made.evaluation(x, 14, 0.1, 0.95))
    )
    assert "against the bf16 baseline's 12.00 in 50% of its size" in _say(
        rows_of(made.evaluation(base), made.evaluation(x, 14))
    )
    small = {**base, "bits_per_weight": 4.9, "format": "Q4_1"}
    assert "of the baseline's size" in _say(rows_of(made.evaluation(small), made.evaluation(x, 14, 0.1, 0.95)))


def test_the_headline_compares_speeds_of_one_protocol_where_there_are_several(rows_of: Any, made: ModuleType) -> None:
    base, x = made.model("smollm2"), made.model("x", 50, recipe="x")
    rows = rows_of(made.evaluation(base), made.evaluation(x, 14, 0.1, 0.95), made.bench(base, 10), made.bench(x, 20),
                   made.bench(base, 40, {"batch": 8}), made.bench(x, 120, {"batch": 8}))  # fmt: skip
    assert "decodes 2.0 times as fast" in _say(rows)
    assert headline(rows)[1].endswith("with smollm2, under protocol 1.")


def test_one_row_and_no_row_that_succeeded_have_headlines(rows_of: Any, made: ModuleType) -> None:
    model = made.model("a")
    assert _say(rows_of(made.bench(model))) == "a: 100 MB of weights, 30.0 tokens/s"
    assert _say(rows_of(made.failed(made.bench(model), "x"))) == "No measurement succeeded"


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=12))
def test_text_before_the_departure_is_shared_and_the_departure_differs(output: str, expected: str) -> None:
    start, end = departure(output, expected)
    assert expected.startswith(output[:start])
    if start < len(output):
        assert start < end <= len(output)
        assert not expected.startswith(output[:end])
    else:
        assert expected.startswith(output)


@pytest.mark.parametrize(
    ("output", "expected", "word"),
    [("the blue sky", "the black sky", "blue"), ("same and more", "same", " and"), ("one", "one two", ""),
     ("x", "y", "x"), ("a  b", "a c", " b"), ("cat sat", "cats sat", "cat ")],
)  # fmt: skip
def test_the_departure_is_a_whole_word(output: str, expected: str, word: str) -> None:
    start, end = departure(output, expected)
    assert output[start:end] == word


def test_samples_stand_side_by_side_and_say_where_they_depart(rows_of: Any, made: ModuleType) -> None:
    first = prompts(rows_of(*made.study()))[0]
    by_label = {output.label: output for output in first.outputs}
    assert first.outputs[0].baseline
    assert by_label["int8"].verdict == "identical to the baseline"
    assert (by_label["int3-gptq"].departure, by_label["int3-gptq"].verdict) == ("as", "departs at word 5")
    assert by_label["int4-rtn"].same.endswith("scatter ")


def test_a_model_in_two_engines_answers_once(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a")
    asked = made.evaluation(a, samples=[{"prompt": "p", "output": "o"}])
    found = prompts(rows_of(asked, made.bench(a), made.bench(a, engine={"name": "llama.cpp"})))
    assert [len(prompt.outputs) for prompt in found] == [1]


def test_a_model_answers_by_the_evaluation_that_asked_it(rows_of: Any, made: ModuleType) -> None:
    a = made.model("a")
    asked = made.evaluation(a, samples=[{"prompt": "p", "output": "o"}], protocol={"corpus": "z"})
    found = prompts(rows_of(made.evaluation(a, protocol={"corpus": "b"}), asked))
    assert [[output.same for output in prompt.outputs] for prompt in found] == [["o"]]


def test_the_heat_map_has_a_line_per_linear_and_a_column_per_block(rows_of: Any, made: ModuleType) -> None:
    maps = heat_maps(rows_of(*made.study()))
    assert [heat.label for heat in maps] == ["int3-gptq", "int4-gptq", "int4-rtn", "int8"]
    heat = maps[0]
    assert heat.linears == ("q", "k", "v", "o", "gate", "up", "down")
    assert heat.blocks == tuple(range(30))
    assert heat.worst.startswith("block 0 down (1.24), ")
    assert [heat.unit for heat in maps[1:3]] == ["relative output error", "relative weight error"]


def test_missing_layers_are_gaps_and_far_blocks_cost_nothing(rows_of: Any, made: ModuleType) -> None:
    record = made.compression(made.model("a"), blocks=1)
    record["results"]["layers"] = [
        {"block": 10**12, "linear": "zz", "relative_error": 0.5, "format": None},
        {"block": 0, "linear": "q", "relative_error": 0.1},
        {"block": 0, "linear": "q", "relative_error": 0.2},
        {"block": None, "linear": "lm_head", "relative_error": 0.9},
    ]
    (heat,) = heat_maps(rows_of(record))
    assert heat.blocks == (0, 10**12)
    assert heat.error == ((0.2, None), (None, 0.5)), "the last entry of a layer counts"


def test_a_failed_or_empty_compression_draws_no_map(rows_of: Any, made: ModuleType) -> None:
    failed = made.failed(made.compression(made.model("a")), "x")
    empty = made.compression(made.model("b"), blocks=0)
    assert heat_maps(rows_of(failed, empty)) == []
