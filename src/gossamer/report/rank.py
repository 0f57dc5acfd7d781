"""Low rank as a table: ranks that are alike in all layers beside allocated ones. Knows the rows of a study only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .columns import FAILED, MISSING
from .study import StudyRow, protocol_sentences
from .text import amount, divergence, number, quality

ALLOCATED = "-kld"
TITLES = ["ratio", "ranks", "parameters, millions", "bits/weight", "KLD", "perplexity", "made in s"]


def rank_table(rows: Sequence[StudyRow], parameters: Mapping[str, int]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, the largest ratio first, uniform before allocated; `parameters`: row name -> numbers held."""
    ranked = sorted((row for row in rows if not row.baseline), key=lambda row: (-_ratio(row), row.name))
    base = [row for row in rows if row.baseline]
    return TITLES, [_cells(row, parameters.get(row.name)) for row in (*base, *ranked)]


def gains(rows: Sequence[StudyRow]) -> list[str]:
    """A sentence for each ratio: what allocating gains over ranks that are alike."""
    by_name = {row.name: row for row in rows}
    said = []
    for row in sorted(rows, key=lambda r: r.name, reverse=True):
        other = by_name.get(f"{row.name}{ALLOCATED}")
        if other is not None and row.kld and other.kld is not None:
            said.append(
                f"Ratio {row.name}: KL divergence {divergence(other.kld)} by allocated ranks, {divergence(row.kld)} by "
                f"uniform ones, {number(other.kld / row.kld, 2)} of it."
            )
    return said


def rank_markdown(rows: Sequence[StudyRow], parameters: Mapping[str, int], values: Sequence[Mapping[str, Any]]) -> str:
    """The whole study as a page, with the picture `study.svg` that lies beside it."""
    titles, cells = rank_table(rows, parameters)
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    failures = [f"{row.name}: {error}" for row in rows for error in row.errors]
    parts = ["# Low rank, uniform and allocated", *gains(rows), "![size against divergence](study.svg)"]
    return "\n\n".join([*parts, "\n".join(lines), *failures, *protocol_sentences(values)]) + "\n"


def _ratio(row: StudyRow) -> float:
    return float(row.name.removesuffix(ALLOCATED))


def _cells(row: StudyRow, held: int | None) -> list[str]:
    def cell(value: float | None, text: Any) -> str:
        return (FAILED if row.failed else MISSING) if value is None else str(text(value))

    allocated = row.name.endswith(ALLOCATED)
    return [
        f"{row.name} (as it is)" if row.baseline else row.name.removesuffix(ALLOCATED),
        MISSING if row.baseline else "allocated" if allocated else "uniform",
        cell(held, lambda v: number(v / 1e6, 2)),
        cell(row.bits, lambda v: number(v, 2)),
        cell(row.kld, divergence),
        cell(row.perplexity, quality),
        MISSING if row.baseline else cell(row.made_seconds, amount),
    ]
