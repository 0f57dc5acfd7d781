"""Which models no other model beats: quality against size, and quality against speed.

Points of different protocols are different series, each with a front of its own: a front across protocols
would compare what cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .protocol import protocols
from .rows import Row, finite
from .text import clean, divergence, megabytes, percent, quality

Metric: TypeAlias = Literal["kld_mean", "perplexity"]
Axis: TypeAlias = Literal["size", "speed"]


@dataclass(frozen=True)
class Point:
    """One model in a plot. `series` is its protocol mark, empty if there is one protocol."""

    label: str
    x: float
    y: float
    text: str
    """What is said of it when pointed at."""
    series: str
    baseline: bool


@dataclass(frozen=True)
class Panel:
    """One plot: points, the fronts as positions of points, baselines to draw as a line, and who is absent and why."""

    metric: Metric
    axis: Axis
    points: tuple[Point, ...]
    fronts: tuple[tuple[int, ...], ...]
    baselines: tuple[tuple[str, float], ...]
    missing: tuple[str, ...]


def front(points: Sequence[tuple[float, float]], more_is_better: bool) -> tuple[int, ...]:
    """Positions of the points (x, y) that none beats in both, by rising x. Low y is better; x as told.

    Equal points are both kept: neither beats the other.
    """
    sign = -1 if more_is_better else 1
    keys = [(sign * x, y) for x, y in points]
    kept = [i for i, key in enumerate(keys) if not any(_beats(other, key) for other in keys)]
    return tuple(sorted(kept, key=lambda i: (points[i][0], sign * -points[i][1])))


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def panels(rows: Sequence[Row]) -> list[Panel]:
    """The plots that have something to compare: each metric against each axis."""
    metrics: tuple[Metric, ...] = ("kld_mean", "perplexity")
    axes: tuple[Axis, ...] = ("size", "speed")
    found = [_panel(rows, metric, axis) for metric in metrics for axis in axes]
    return [panel for panel in found if panel.points and len(panel.points) + len(panel.baselines) > 1]


def _panel(rows: Sequence[Row], metric: Metric, axis: Axis) -> Panel:
    marks, usual = protocols(rows), rows[0].engine if rows else None
    points: dict[Point, None] = {}
    baselines: dict[tuple[str, float], None] = {}
    missing: dict[str, None] = {}
    for i, row in enumerate(rows):
        x, y = _x(row, axis), finite(getattr(row, metric))
        name = clean(row.label)
        if axis == "speed" and row.engine != usual:
            name += f", {clean(row.bench.engine.name)}" if row.bench else ""
        if row.baseline and metric == "kld_mean":
            # Its divergence is zero by definition: a line at its size or speed says where the others come from.
            if x is not None and not row.failed:
                mark = marks.marks(i)[1] if axis == "speed" else ""
                baselines[f"{name} [{mark}]" if mark else name, x] = None
        elif row.failed or x is None or y is None:
            missing[f"{name} ({_why(row, metric, x)})"] = None
        else:
            quality_mark, speed_mark = marks.marks(i)
            series = " ".join(m for m in (quality_mark, speed_mark if axis == "speed" else "") if m)
            points[Point(name, x, y, _text(row, name, axis), series, row.baseline)] = None
    return Panel(metric, axis, tuple(points), _fronts(list(points), axis), tuple(baselines), tuple(missing))


def _fronts(points: list[Point], axis: Axis) -> tuple[tuple[int, ...], ...]:
    """A front for each series that has one to draw."""
    fronts = []
    for series in dict.fromkeys(point.series for point in points):
        members = [i for i, point in enumerate(points) if point.series == series]
        best = front([(points[i].x, points[i].y) for i in members], more_is_better=axis == "speed")
        fronts.append(tuple(members[i] for i in best))
    return tuple(fronts)


def _x(row: Row, axis: Axis) -> float | None:
    """Weight memory in MB, or decode tokens per second."""
    if axis == "speed":
        return finite(row.decode_tokens_per_s)
    return row.size_bytes / 1e6 if row.size_bytes is not None else None


def _why(row: Row, metric: Metric, x: float | None) -> str:
    if row.failed:
        return f"{row.failures[0].kind} failed"
    if x is None:
        return "not benched"
    value = getattr(row, metric)
    name = "KL divergence" if metric == "kld_mean" else "perplexity"
    return f"no {name}" if value is None else f"{name} is {value}"


def _text(row: Row, name: str, axis: Axis) -> str:
    """The row in a few lines. Not the speed if the axis is size: one model is one point there, in any engine."""
    lines = [name]
    if row.size_bytes is not None:
        lines.append(f"{megabytes(row.size_bytes)} MB")
    if row.decode_tokens_per_s is not None and axis == "speed":
        lines.append(f"{row.decode_tokens_per_s:.1f} tok/s decode")
    if row.kld_mean is not None:
        lines.append(f"KLD {divergence(row.kld_mean)}")
    if row.perplexity is not None:
        lines.append(f"perplexity {quality(row.perplexity)}")
    if row.top1_agreement is not None:
        lines.append(f"top-1 {percent(row.top1_agreement)} %")
    return "\n".join(lines)
