"""One self-contained HTML page: table, trade-offs, sensitivity of the layers, samples, protocol and machine.

The page asks for nothing from anywhere: its policy forbids every request, and runs no script but those written here,
known by their hash. All foreign text is escaped. The table, the samples and the notes read without JavaScript.
Does not know where rows come from.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import MeasureError
from .columns import COLUMNS, FAILED, GROUPS, MISSING, Column, engine_labels, method
from .export import write_text
from .headline import headline
from .pareto import panels
from .protocol import Protocols, failure_notes, machine_sentence, protocols, source_notes
from .records import Machine
from .rows import Row, finite
from .samples import prompts
from .sensitivity import heat_maps
from .table import legend
from .text import clean

_SCRIPTS = ("sort.js", "plots.js")


def write_html(rows: Sequence[Row], path: str | Path, title: str = "Gossamer report") -> None:
    """Write the page, whole or not at all. Raises UsageError if the path is a folder, MeasureError if it cannot."""
    write_text(path, render_html(rows, title))


def render_html(rows: Sequence[Row], title: str = "Gossamer report") -> str:
    """The page as text; the same rows give the same bytes. Raises MeasureError if there are no rows."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    if not rows:
        raise MeasureError("nothing to report: there are no rows")
    plots = {"panels": [asdict(panel) for panel in panels(rows)], "heat": [asdict(heat) for heat in heat_maps(rows)]}
    drawn = bool(plots["panels"] or plots["heat"])
    scripts = [*([_plotly()] if drawn else []), *(_asset(name) for name in (_SCRIPTS if drawn else _SCRIPTS[:1]))]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html.j2")).render(
        title=clean(title),
        policy=_policy(scripts),
        style=Markup(_asset("style.css")),  # ours, like the scripts: nothing foreign is in them
        scripts=[Markup(script) for script in scripts],
        data=Markup(_embedded_json(plots)),
        plots=plots,
        metrics=list(dict.fromkeys(panel["metric"] for panel in plots["panels"])),
        shared_scale=len(plots["heat"]) > 1,
        prompts=prompts(rows),
        **_table(rows),
        **_notes(rows),
    )


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """What the template needs for headline and table; columns without a single value are left out."""
    found = protocols(rows)
    groups = [(name, [c for c in columns if any(c.text(row) != MISSING for row in rows)]) for name, columns in GROUPS]
    groups = [(name, columns) for name, columns in groups if columns]
    columns = [column for _, members in groups for column in members]
    sentence, why = headline(rows)
    return {
        "headline": sentence,
        "why": why,
        "groups": groups,
        "engines": len(engine_labels(rows)) > 1,
        "rows": [_line(row, found.mark(i), columns) for i, row in enumerate(rows)],
    }


def _line(row: Row, mark: str, columns: Sequence[Column]) -> dict[str, Any]:
    """One table row."""
    return {
        "label": clean(row.label),
        "mark": mark,
        "method": method(row),
        "engine": clean(row.engine or MISSING).partition(" ("),
        "baseline": row.baseline,
        "failed": row.failed,
        "cells": [_cell(column, row) for column in columns],
    }


def _cell(column: Column, row: Row) -> dict[str, Any]:
    value, text = finite(column.value(row)), column.text(row)
    return {
        "text": text,
        "detail": column.detail(row),
        "value": "" if value is None else repr(float(value)),
        "state": {MISSING: "missing", FAILED: "failed"}.get(text, ""),
    }


def _notes(rows: Sequence[Row]) -> dict[str, Any]:
    """What stands under the table and in the protocol section."""
    found: Protocols = protocols(rows)
    machines = dict.fromkeys(_machine(r.machine) for row in rows for r in row.records if r.machine.cpu)
    created = [record.created for row in rows for record in row.records]
    return {
        "protocols": [
            ("Quality", found.quality, found.quality_differences),
            ("Speed and memory", found.speed, found.speed_differences),
        ],
        "sources": source_notes(rows),
        "failures": failure_notes(rows),
        "machines": list(machines),
        "engine_names": engine_labels(rows),
        "legend": legend(),
        "glossary": COLUMNS,
        "hidden": sum(row.superseded for row in rows),
        "newest": max(created).strftime("%Y-%m-%d"),
    }


def _machine(machine: Machine) -> str:
    """The machine, with the Python that its numbers do not depend on."""
    return machine_sentence(machine) + (clean(f", Python {machine.python}") if machine.python else "")


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: no request at all, no script but these. Plotly sets styles at run time."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embedded_json(value: object) -> str:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js as the plotly package carries it, safe inside a script element."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    return str(get_plotlyjs()).replace("\r\n", "\n").replace("</script", "<\\/script")
