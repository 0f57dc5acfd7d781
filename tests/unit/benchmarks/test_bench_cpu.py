"""The parts of the CPU benchmark that measure nothing: its rows, and how samples become a verdict and a page."""

from __future__ import annotations

import json
from typing import Any

import pytest

import cpu_models
import cpu_report
import cpu_rows
import peers

MODELS: dict[str, dict[str, Any]] = {
    "int4": {"bits_per_weight": 4.3, "weight_bytes": 72e6, "kld": 0.2},
    "q4_0": {"bits_per_weight": 4.5, "weight_bytes": 76e6, "kld": 0.4},
}


def result(**changes: Any) -> dict[str, Any]:
    """A row's result as bench_cpu makes it."""
    row = {
        "key": "decode", "title": "decode, batch 1", "ours": "int4", "peer": "llama.cpp", "theirs": "q4_0",
        "samples": {"ours": [600.0, 640.0], "peer": [300.0, 200.0]}, "ratios": [2.0, 3.2], "ratio": 2.6,
        "wanted": 2.0, "reason": None,
    }  # fmt: skip
    return row | changes


def test_every_row_names_a_peer_and_files_that_can_be_made() -> None:
    assert len({row.key for row in cpu_rows.ROWS}) == len(cpu_rows.ROWS)
    for row in cpu_rows.ROWS:
        assert row.peer in peers.PEERS or row.peer == cpu_rows.READ
        assert set(row.models) <= set(cpu_models.MODELS)


def test_rows_are_chosen_by_name_and_a_wrong_name_is_said() -> None:
    assert [row.key for row in cpu_rows.chosen("decode-q8,decode-q4")] == ["decode-q4", "decode-q8"]
    with pytest.raises(ValueError, match="decode-q5"):
        cpu_rows.chosen("decode-q4,decode-q5")


def test_a_quick_row_times_the_same_work_on_fewer_tokens() -> None:
    row = cpu_rows.chosen("decode-deep-q4")[0]
    assert cpu_rows.quick(row).request.output == row.request.output // 4
    assert cpu_rows.quick(row).request.context == row.request.context


def test_ratios_are_those_of_samples_taken_one_after_the_other() -> None:
    assert cpu_report.ratios([600.0, 640.0], [300.0, 200.0]) == [2.0, 3.2]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "pass"),
        ({"ratio": 1.99}, "short"),
        ({"wanted": None}, "information"),
        ({"reason": "llama-bench failed", "ratio": None, "ratios": []}, "failed: llama-bench failed"),
    ],
)
def test_the_verdict_follows_the_ratio(changes: dict[str, Any], word: str) -> None:
    assert cpu_report.verdict(result(**changes), MODELS) == word


def test_a_pass_with_a_worse_or_larger_file_says_so() -> None:
    swapped = {"int4": MODELS["q4_0"], "q4_0": MODELS["int4"]}
    assert cpu_report.verdict(result(), swapped) == "pass, but more bits per weight and KL divergence is higher"


def test_a_row_measured_on_a_busy_machine_says_so() -> None:
    samples = {"ours": [600.0], "peer": [300.0], "foreign_cores": [1.2, 1.4]}
    assert cpu_report.verdict(result(samples=samples), MODELS) == "pass, but others used 1.3 cores"


def test_the_page_has_a_line_for_every_row_the_failed_ones_too() -> None:
    failed = result(
        key="prefill", reason="no answer within 300 s", ratio=None, ratios=[], samples={"ours": [], "peer": []}
    )
    memory = result(key="share", peer="read bandwidth", theirs="", samples={"ours": [40e9], "peer": [50e9]})
    run = {
        "command": "python benchmarks/bench_cpu.py",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a CPU", "isa": "avx2", "cores": 2, "os": "Linux"},
        "versions": {"gossamer": "0.1.0"},
        "protocol": {"threads": 2, "rounds": 2, "corpus": "a text", "tokens": 1000},
        "models": MODELS,
        "rows": [result(), failed, memory],
    }
    page = cpu_report.page(json.loads(json.dumps(run)))
    assert "| 620.0 | 250.0 | 2.60 (2.00 3.20) | 2.00 | pass |" in page
    assert "failed: no answer within 300 s |" in page
    assert "read bandwidth 50.0 GB/s" in page
    assert "already 4-bit" in page
