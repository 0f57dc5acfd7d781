"""Rows, table, picture and recommendation of a study, from records made by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from gossamer.report.study import StudyRow, recommendation, study_markdown, study_rows, study_table
from gossamer.report.study_plot import study_svg

MB = 1_000_000


def record(kind: str, name: str, fingerprint: str | None, **more: Any) -> dict[str, Any]:
    model = {"name": name, "fingerprint": fingerprint, "recipe": more.pop("recipe", None)} | more.pop("model", {})
    plain = {"schema": 1, "kind": kind, "status": "ok", "error": None, "created": "2026-01-01T00:00:00+00:00"}
    return plain | {"model": model, "protocol": {}, "results": {}} | more


def row(name: str, mb: float, kld: float, *decode: tuple[int, float], **more: Any) -> StudyRow:
    return StudyRow(name, bits=mb / 16, nbytes=int(mb * MB), kld=kld, decode=decode, **more)


ROWS = [
    StudyRow("base", baseline=True, nbytes=270 * MB, kld=0.0, decode=((1, 100.0), (8, 400.0))),
    row("int2", 40, 0.9, (1, 150.0), (8, 380.0)),
    row("int4", 75, 0.09, (1, 250.0), (8, 700.0)),
    row("fp4", 76, 0.2, (1, 90.0), (8, 200.0)),
    row("int8", 140, 0.004, (1, 180.0), (8, 900.0)),
]


def test_records_of_one_artifact_become_one_row_named_by_its_recipe() -> None:
    speed = {"decode_tokens_per_s": {"median": 50.0}, "prefill_tokens_per_s": {"median": 500.0}}
    rows = study_rows(
        [
            record("compress", "s/int4", "f4", recipe="int4", model={"weight_bytes": 75 * MB, "bits_per_weight": 4.5},
                   results={"seconds": 9.0, "peak_rss_bytes": 800 * MB}),
            record("compress", "s/bad", None, recipe="bad", status="failed", error="no room"),
            record("eval", "base", "f0", model={"weight_bytes": 270 * MB}, results={"kld_mean": 0.0}),
            record("eval", "s/int4", "f4", results={"kld_mean": 0.09, "perplexity": 19.0, "top1_agreement": 0.9}),
            record("bench", "s/int4", "f4", protocol={"batch": 8}, results=speed),
            record("bench", "s/int4", "f4", protocol={"batch": 64}, status="failed", error="too slow"),
        ]
    )  # fmt: skip
    assert [(r.name, r.baseline, r.failed) for r in rows] == [
        ("base", True, False),
        ("int4", False, True),
        ("bad", False, True),
    ]
    assert (rows[1].kld, rows[1].speed(8), rows[1].speed(64), rows[1].made_seconds) == (0.09, 50.0, None, 9.0)
    assert rows[1].errors == ("timing it failed: too slow",)
    assert rows[2].errors == ("making it failed: no room",)


def test_table_and_page_show_every_row_and_mark_what_failed() -> None:
    rows = [*ROWS, StudyRow("broken|one", errors=("making it failed: x",))]
    titles, cells = study_table(rows)
    assert all(len(line) == len(titles) for line in cells)
    assert "decode t/s, batch 8" in titles
    assert "failed" in cells[-1]
    page = study_markdown(rows, recommendation(rows), [])
    assert "broken\\|one" in page
    assert page.count("\n| ") == len(rows) + 1  # and the titles
    assert "study.svg" in page


def test_without_bounds_the_smallest_within_the_usual_divergence_is_taken() -> None:
    said = recommendation(ROWS)
    assert said[0].startswith("Take int4: 75.0 MB")
    assert "2.50 times the model as it is" in said[0]
    assert "2 of 4 formats keep to a KL divergence of at most 0.100 (the usual bound" in said[0]
    assert any("faster: int8 at batch 8 (1.29 times as fast)" in s for s in said)


def test_a_bound_on_size_takes_the_closest_and_one_on_divergence_the_smallest() -> None:
    assert recommendation(ROWS, max_bytes=80 * MB)[0].startswith("Take int4")
    assert recommendation(ROWS, max_bytes=200 * MB)[0].startswith("Take int8")
    assert recommendation(ROWS, max_kld=1.0)[0].startswith("Take int2")
    assert recommendation(ROWS, max_kld=0.01)[0].startswith("Take int8")


def test_within_both_bounds_the_fastest_is_taken() -> None:
    assert recommendation(ROWS, max_bytes=200 * MB, max_kld=0.5)[0].startswith("Take int4")


def test_bounds_that_nothing_keeps_to_are_said_with_the_nearest() -> None:
    said = recommendation(ROWS, max_bytes=80 * MB, max_kld=0.01)[0]
    assert said.startswith("None of 4 formats keeps to a KL divergence of at most 0.0100 and at most 80.0 MB")
    assert "The nearest is int4" in said
    assert "The nearest is int2" in recommendation(ROWS, max_bytes=10 * MB)[0]


def test_what_another_beats_in_both_is_named_with_the_one_that_does() -> None:
    said = recommendation(ROWS)
    assert "No other is both smaller and closer than: int2, int4, int8." in said
    assert any("fp4 by int4 (1.3% smaller, KL divergence 0.0900 for 0.200)" in s for s in said)


def test_failures_are_part_of_what_is_said_and_nothing_judged_is_no_recommendation() -> None:
    failed = StudyRow("x", errors=("making it failed: no room",))
    assert "x: making it failed: no room" in recommendation([*ROWS, failed])
    assert recommendation([ROWS[0], failed]) == [
        "No format could be judged, so nothing can be recommended.",
        "x: making it failed: no room",
    ]


def test_a_smaller_kv_cache_is_a_row_of_its_own_and_no_choice_of_weights() -> None:
    def bench(cache: dict[str, str], per_token: float) -> dict[str, Any]:
        return record(
            "bench", "base", "f0", protocol={"batch": 1, **cache}, results={"rm_kv_bytes_per_token": per_token}
        )

    cache = {"kv_cache": "int4"}
    judged = record("eval", "base", "f0", protocol=cache, results={"kld_mean": 0.02}, model={"weight_bytes": MB})
    rows = study_rows([bench({}, 24_000.0), judged, bench(cache, 6_000.0)])
    assert [(r.name, r.baseline, r.kv_cache, r.kv_bytes) for r in rows] == [
        ("base", True, None, 24_000.0),
        ("kv-int4", False, "int4", 6_000.0),
    ]
    said = recommendation([*ROWS, rows[1]], max_bytes=2 * MB)
    assert said[0].startswith("None of 4 formats")
    assert any("int4: 6.0 kB for each token of context, KL divergence 0.0200" in s for s in said)
    assert recommendation(rows)[1] == (
        "Keys and values in int4: 6.0 kB for each token of context, 0.25 of the usual, KL divergence 0.0200 by itself."
    )


def test_the_picture_is_xml_with_a_point_for_each_value_and_no_foreign_markup() -> None:
    rows = [*ROWS, row("<script>&", 60, 0.5, (1, 30.0))]
    svg = study_svg(rows)
    root = ET.fromstring(svg)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 5 + 11  # divergence of all but the baseline; speeds of all at their batch sizes
    for circle in circles:
        assert 0 <= float(circle.get("cx", "-1")) <= 460
        assert 0 <= float(circle.get("cy", "-1")) <= 360
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"int4", "int8", "batch 8", "KL divergence, nats per token"} <= set(texts)
    assert "<script>" not in svg


def test_a_picture_of_nothing_or_of_one_point_is_a_picture() -> None:
    ET.fromstring(study_svg([]))
    ET.fromstring(study_svg([row("only", 5, 0.1)]))
    ET.fromstring(study_svg([row("exact", 5, 0.0, (1, 3.0))]))
