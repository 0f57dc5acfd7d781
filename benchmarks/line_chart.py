"""Lines in panels side by side, as one SVG; both axes logarithmic. Needs no script and no font."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gossamer.report.study_plot import BOTTOM, HEIGHT, INK, LEFT, MUTED, RIGHT, RULE, SERIES, TOP, WIDTH, Axis


@dataclass(frozen=True)
class Line:
    """Points with x and y above 0, in order."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    x_label: str
    lines: Sequence[Line]


def chart(panels: Sequence[Panel]) -> str:
    """The SVG."""
    body = "".join(f'<g transform="translate({i * WIDTH} 0)">{_panel(panel)}</g>' for i, panel in enumerate(panels))
    width = WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f"{body}</svg>\n"
    )


def _panel(panel: Panel) -> str:
    points = [point for line in panel.lines for point in line.points]
    x = _axis([at for at, _ in points], LEFT, WIDTH - RIGHT)
    y = _axis([at for _, at in points], HEIGHT - BOTTOM, TOP + 12 * len(panel.lines))
    parts = [_text(LEFT, 18, panel.title, INK, weight="600")]
    for value in y.ticks():
        parts.append(f'<path d="M{LEFT} {y.at(value):.1f}H{WIDTH - RIGHT}" stroke="{RULE}"/>')
        parts.append(_text(LEFT - 6, y.at(value) + 4, f"{value:,.6g}", MUTED, anchor="end"))
    for value in x.ticks():
        parts.append(_text(x.at(value), HEIGHT - BOTTOM + 16, f"{value:,.6g}", MUTED, anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, panel.x_label, MUTED, anchor="middle"))
    for i, line in enumerate(panel.lines):
        color = SERIES[i % len(SERIES)]
        path = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in line.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.5" fill="{color}"/>' for a, b in line.points]
        parts.append(_text(WIDTH - RIGHT, TOP + 2 + 12 * i, line.name, color, anchor="end"))
    return "".join(parts)


def _axis(values: Sequence[float], start: float, stop: float) -> Axis:
    """An axis with some room at both ends."""
    low, high = min(values), max(values)
    room = max(0.05 * math.log(high / low), 0.1)
    return Axis(low * math.exp(-room), high * math.exp(room), start, stop)


def _text(x: float, y: float, text: str, color: str, anchor: str = "start", weight: str = "400") -> str:
    style = f'fill="{color}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
