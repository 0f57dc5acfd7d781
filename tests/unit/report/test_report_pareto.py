"""The Pareto front: exactly the models that no other beats, per protocol, without failed rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.report import load
from gossamer.report.pareto import Panel, front, panels

_NUMBERS = st.integers(0, 6).map(float)


@pytest.fixture
def rows_of(tmp_path: Path, made: ModuleType) -> Any:
    """Rows of these records, through a file."""
    return lambda *records: load([made.write(tmp_path / "r.jsonl", *records)])


def _panel(rows: Any, metric: str, axis: str) -> Panel:
    return next(panel for panel in panels(rows) if (panel.metric, panel.axis) == (metric, axis))


def _labels(panel: Panel, positions: tuple[int, ...]) -> list[str]:
    return [panel.points[i].label for i in positions]


@given(st.lists(st.tuples(_NUMBERS, _NUMBERS), max_size=12), st.booleans())
def test_a_point_is_on_the_front_exactly_if_none_beats_it(points: list[tuple[float, float]], more: bool) -> None:
    def beaten(p: tuple[float, float]) -> bool:
        return any((q[0] >= p[0] if more else q[0] <= p[0]) and q[1] <= p[1] and q != p for q in points)

    chosen = front(points, more_is_better=more)
    assert set(chosen) == {i for i, p in enumerate(points) if not beaten(p)}
    xs, ys = [points[i][0] for i in chosen], [points[i][1] for i in chosen]
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=not more)


def test_the_front_of_size_and_the_front_of_speed_are_different_questions(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(*made.study())
    size, speed = _panel(rows, "kld_mean", "size"), _panel(rows, "kld_mean", "speed")
    assert _labels(size, size.fronts[0]) == ["int3-gptq", "int4-gptq", "int8"]
    assert _labels(speed, speed.fronts[0]) == ["int8", "int4-gptq", "int4-rtn"]


def test_the_baseline_is_a_line_in_divergence_and_a_point_in_perplexity(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(*made.study())
    assert _panel(rows, "kld_mean", "size").baselines == (("smollm2", 145.3),)
    perplexity = _panel(rows, "perplexity", "size")
    assert [point.label for point in perplexity.points if point.baseline] == ["smollm2"]


def test_failed_rows_are_absent_from_the_points_and_listed_with_the_reason(rows_of: Any, made: ModuleType) -> None:
    for panel in panels(rows_of(*made.study())):
        assert "int2-kmeans" not in [point.label for point in panel.points]
        assert panel.missing == ("int2-kmeans (eval failed)",)


def test_rows_without_the_number_are_listed_too(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("a", 10)), made.evaluation(made.model("b", 20)),
                   made.evaluation(made.model("c", 30), float("inf")), made.bench(made.model("d", 40)))  # fmt: skip
    assert _panel(rows, "perplexity", "size").missing == ("c (perplexity is inf)", "d (no perplexity)")


def test_protocols_have_fronts_of_their_own(rows_of: Any, made: ModuleType) -> None:
    rows = rows_of(made.evaluation(made.model("a", 10), 20), made.evaluation(made.model("b", 20), 15),
                   made.evaluation(made.model("c", 5), 10, protocol={"context": 256}))  # fmt: skip
    panel = _panel(rows, "perplexity", "size")
    assert sorted(_labels(panel, chosen) for chosen in panel.fronts) == [["a", "b"], ["c"]], "c beats neither"


def test_a_model_in_two_engines_is_one_point_of_size_and_two_of_speed(rows_of: Any, made: ModuleType) -> None:
    a, b = made.model("a", 10), made.model("b", 20)
    rows = rows_of(made.evaluation(a), made.evaluation(b), made.bench(a, 5), made.bench(b, 6),
                   made.bench(a, 9, engine={"name": "llama.cpp"}))  # fmt: skip
    assert len(_panel(rows, "perplexity", "size").points) == 2
    assert sorted(p.label for p in _panel(rows, "perplexity", "speed").points) == ["a", "a, llama.cpp", "b"]


def test_a_baseline_of_two_speed_protocols_is_two_lines_told_apart(rows_of: Any, made: ModuleType) -> None:
    base, x = made.model("smollm2"), made.model("x", 50, recipe="x")
    rows = rows_of(made.evaluation(base), made.evaluation(x, 14, 0.1, 0.9), made.bench(base, 10), made.bench(x, 20),
                   made.bench(base, 40, {"batch": 8}))  # fmt: skip
    assert _panel(rows, "kld_mean", "speed").baselines == (("smollm2 [1]", 10), ("smollm2 [2]", 40))
    assert _panel(rows, "kld_mean", "size").baselines == (("smollm2", 100),)


def test_one_point_alone_is_not_worth_a_plot(rows_of: Any, made: ModuleType) -> None:
    assert panels(rows_of(made.evaluation(made.model("a")), made.bench(made.model("a")))) == []
