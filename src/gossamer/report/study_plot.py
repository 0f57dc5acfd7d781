"""The picture of a study of number formats, as one SVG: divergence against size, and speed against size.

Needs no script and no font; foreign text is escaped. Knows rows; knows no record and no page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .pareto import front
from .study import StudyRow, batches
from .text import clean

WIDTH, HEIGHT = 460, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 34, 46
INK, MUTED, RULE, ACCENT = "#1f2328", "#656d76", "#d8dee4", "#0969da"
SERIES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989")
LABEL_WIDTH, LABEL_HEIGHT = 6.2, 13.0
"""Pixels of a letter and of a line, at the size in which labels are written."""


@dataclass(frozen=True)
class Mark:
    """A point with its name and colour."""

    x: float
    y: float
    label: str
    color: str


@dataclass(frozen=True)
class Axis:
    """Values to pixels, logarithmic; `low` and `high` are its ends."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each decade within the ends."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [v for e in decades for step in (1, 2, 5) if self.low <= (v := step * 10.0**e) <= self.high]


def study_svg(rows: Sequence[StudyRow]) -> str:
    """The picture; panels for which there is nothing to draw are left out."""
    panels = [panel for panel in (_divergence(rows), _speed(rows)) if panel]
    body = "".join(f'<g transform="translate({i * WIDTH} 0)">{panel}</g>' for i, panel in enumerate(panels))
    width = WIDTH * max(1, len(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f"{body}</svg>\n"
    )


def _divergence(rows: Sequence[StudyRow]) -> str:
    """KL divergence against size, with the line that no format is below."""
    marks = [
        Mark(row.nbytes / 1e6, row.kld, row.name, ACCENT)
        for row in rows
        if row.nbytes
        and row.kld
        and not row.baseline
        and not row.kv_cache  # a divergence of zero has no place on a logarithmic axis
    ]
    best = front([(mark.x, mark.y) for mark in marks], more_is_better=False)
    return _panel("KL divergence, nats per token", marks, line=[marks[i] for i in best]) if marks else ""


def _speed(rows: Sequence[StudyRow]) -> str:
    """Decode speed against size, a colour for each batch size; only the smallest batch is labelled."""
    marks = []
    sizes = batches(rows)
    for n, batch in enumerate(sizes):
        for row in rows:
            speed = row.speed(batch)
            if row.nbytes and speed and not row.kv_cache:
                marks.append(Mark(row.nbytes / 1e6, speed, row.name if n == 0 else "", SERIES[n % len(SERIES)]))
    legend = [(f"batch {batch}", SERIES[n % len(SERIES)]) for n, batch in enumerate(sizes)]
    return _panel("decode, tokens per second", marks, legend=legend) if marks else ""


def _panel(title: str, marks: Sequence[Mark], line: Sequence[Mark] = (), legend: Sequence[tuple[str, str]] = ()) -> str:
    x = _axis([mark.x for mark in marks], LEFT, WIDTH - RIGHT)
    y = _axis([mark.y for mark in marks], HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, 18, title, INK, weight="600"), *_grid(x, y)]
    if len(line) > 1:
        steps = [f"M{x.at(line[0].x):.1f} {y.at(line[0].y):.1f}"]
        steps += [f"H{x.at(mark.x):.1f}V{y.at(mark.y):.1f}" for mark in line[1:]]
        parts.append(f'<path d="{"".join(steps)}" fill="none" stroke="{ACCENT}" stroke-opacity="0.4"/>')
    parts += [f'<circle cx="{x.at(m.x):.1f}" cy="{y.at(m.y):.1f}" r="3.5" fill="{m.color}"/>' for m in marks]
    parts += _labels([(x.at(m.x), y.at(m.y), m.label) for m in marks])
    parts += [
        _text(WIDTH - RIGHT, TOP + 4 + LABEL_HEIGHT * n, name, color, anchor="end")
        for n, (name, color) in enumerate(legend)
    ]
    return "".join(parts)


def _axis(values: Sequence[float], start: float, stop: float) -> Axis:
    """An axis with room at both ends."""
    low, high = min(values), max(values)
    room = max(0.08 * math.log(high / low), 0.1)
    return Axis(low * math.exp(-room), high * math.exp(1.6 * room), start, stop)


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{RULE}"/>')
        parts.append(_text(LEFT - 6, at + 4, f"{value:g}", MUTED, anchor="end"))
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{RULE}"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 16, f"{value:g}", MUTED, anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "size, MB", MUTED, anchor="middle"))
    return parts


def _labels(points: Sequence[tuple[float, float, str]]) -> list[str]:
    """Names beside their points, where no other name is; a name without room is left out."""
    taken: list[tuple[float, float, float, float]] = []
    parts = []
    for cx, cy, name in points:
        width = LABEL_WIDTH * len(name)
        for left, base in (
            (cx + 6, cy + 4),
            (cx - 6 - width, cy + 4),
            (cx - width / 2, cy - 7),
            (cx - width / 2, cy + 16),
        ):
            box = (left, base - LABEL_HEIGHT + 3, left + width, base + 2)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 6 and box[3] <= HEIGHT - BOTTOM + 4
            if name and inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(_text(left, base, name, INK))
                break
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(x: float, y: float, text: str, color: str, anchor: str = "start", weight: str = "400") -> str:
    style = f'fill="{color}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(clean(text))}</text>'
